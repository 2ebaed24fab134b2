"""What a model does, tried at load: whoever would be wrong at run time is refused, with the layer and the reason.

Owns: three trials on a few tokens. `facts`: each layer attends once, by a rule that the paged op has (scale, window,
softcap, causal). `local`: nothing but attention mixes tokens, and positions are those that are given. `same`: quire's
attention gives what the model's own does. Shape legend: T tokens, D hidden, H heads, K KV heads, E head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.models.transformers.hook import PROBE, RUN, Slot
from quire.types.errors import ClientError

TOKENS = 8
FAR = 1 << 17  # how far back a window is looked for
# What an attention function may be handed that changes nothing here.
HARMLESS = frozenset(
    """dropout scaling sliding_window softcap is_causal position_ids cache_position use_cache output_attentions
    output_hidden_states output_router_logits return_dict training deterministic position_embeddings layer_idx
    past_key_values past_key_value logits_to_keep cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k
    cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k target_dtype query_length""".split()
)


@dataclass(frozen=True)
class Rule:
    """How one layer attends."""

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None


class Refused(ClientError):
    """Why a model cannot run through the backend."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"layer {path}: {reason}" if path else reason, "model")


Run = Callable[[Tensor, Tensor], Tensor]  # (tokens_T, positions_T) -> hidden_TD


class Model:
    """What the trials are made on: the body of a model, its configuration and its slot."""

    def __init__(self, prefix: str, body: nn.Module, config: Any, slot: Slot, arch: ModelArch) -> None:
        self.body, self.config, self.slot, self.arch = body, config, slot, arch
        self.paths = {module: f"{prefix}.{path}" for path, module in body.named_modules()}

    def run(self, tokens_T: Tensor, positions_T: Tensor, **more: Tensor) -> Tensor:
        out = self.body(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, **more)
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        return hidden[0]

    @contextmanager
    def attending(self, by: str, handler: Any = None) -> Iterator[None]:
        self.config._attn_implementation, self.slot.handler = by, handler
        try:
            yield
        finally:
            self.config._attn_implementation, self.slot.handler = RUN, None


def facts(model: Model, device: torch.device) -> dict[nn.Module, Rule]:
    """The rule of each layer, in the order in which they attend."""
    rules: dict[nn.Module, Rule] = {}

    def note(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        path = model.paths.get(module)
        if path is None:
            raise Refused("", "attends without saying which layer does")
        if module in rules:
            raise Refused(path, "attends twice in one pass, but its keys and values have one place")
        rules[module] = rule_of(path, module, q, k, v, mask, kwargs, model)
        return v.new_zeros((1, q.shape[2], q.shape[1], v.shape[-1]))

    tokens_T = torch.arange(TOKENS, device=device) % model.arch.vocab_size
    # Without padding to look at, Transformers would look for several sequences among the positions, by their numbers.
    more = {}
    if "attention_mask" in inspect.signature(model.body.forward).parameters:
        more = {"attention_mask": torch.ones((1, TOKENS), dtype=torch.long, device=device)}
    with model.attending(PROBE, note):
        model.run(tokens_T, torch.arange(TOKENS, device=device), **more)
    layers = model.arch.num_layers
    if len(rules) != layers:
        raise Refused(*_without_attention(model, rules, layers))
    return rules


def _without_attention(model: Model, rules: dict[nn.Module, Rule], layers: int) -> tuple[str, str]:
    """The first layer that did not attend, and what it is."""
    attended = [rule.path for rule in rules.values()]
    for module in model.body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            for layer in module:
                own = model.paths[layer]
                if not any(each == own or each.startswith(f"{own}.") for each in attended):
                    reason = (
                        f"{type(layer).__name__} has no attention through Transformers' interface (a state-space or "
                        "recurrent layer, or attention of its own), which is all that quire has pages for"
                    )
                    return own, reason
    return "", f"{len(rules)} layers attend through Transformers' interface, but config.json has {layers}"


def rule_of(
    path: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any], model: Model
) -> Rule:
    arch = model.arch
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[3]
    strange = sorted(name for name, value in kwargs.items() if name not in HARMLESS and _says_something(value))
    if strange:
        sinks = " (attention sinks)" if "s_aux" in strange else ""
        raise Refused(path, f"hands {', '.join(strange)}{sinks} to attention, which the paged attention does not have")
    if k.shape[2] != q.shape[2]:
        raise Refused(path, f"attends to {k.shape[2]} keys in a step of {q.shape[2]} tokens (cross attention?)")
    if (kv_heads, size) != (arch.num_kv_heads, arch.head_dim) or heads % kv_heads:
        expected = f"{arch.num_kv_heads} of {arch.head_dim}"
        raise Refused(
            path,
            f"has {heads} query heads and {kv_heads} key heads of size {size}, but the KV cache is made for {expected} "
            "in every layer",
        )
    if v.shape[1] != kv_heads or v.shape[3] > size:
        raise Refused(path, f"has values of {v.shape[1]} heads of size {v.shape[3]} to keys of {kv_heads} of {size}")
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    if scale is None:
        scale = getattr(module, "scaling", None) or size**-0.5
    if not isinstance(scale, int | float) or not (softcap is None or isinstance(softcap, int | float)):
        raise Refused(path, "scales its scores by numbers that are computed")
    window = window_of(path, module, mask, kwargs, model)
    return Rule(path, heads, kv_heads, size, v.shape[3], float(scale), window, softcap or None)


def _says_something(value: Any) -> bool:
    return value is not None and value is not False


def window_of(path: str, module: nn.Module, mask: Any, kwargs: dict[str, Any], model: Model) -> int | None:
    """The window of a causal rule, None for the whole past. The mask is the truth, as in the model's own attention."""
    text = model.config.get_text_config(decoder=True)
    given = kwargs.get("sliding_window")
    if mask is None:
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise Refused(path, "attends to later tokens too (is_causal is false)")
        return given
    rule = getattr(mask, "rule", None)
    if rule is None:
        return _window_of_tensor(path, mask, given, text)
    try:
        window = _first_unseen(rule)
        queries = torch.tensor([0, 1, 5, 1000, FAR, FAR + 1, 3 * FAR])
        near = torch.tensor([-3, -1, 0, 1, 2, 7, 31, 512, 4095, 4096, 8191, FAR - 1])
        edge = near if window is None else torch.cat((near, torch.tensor([window - 1, window, window + 1])))
        q, back = (x.flatten() for x in torch.meshgrid(queries, edge, indexing="ij"))
        q, back = q[back <= q], back[back <= q]
        seen = _ask(rule, q, q - back)
    except Exception as error:
        if mask.device.type == "meta":
            raise  # it looks at tensors of the step, which have no numbers yet
        raise Refused(path, f"asks for a mask that cannot be read ({error})") from error
    expected = (back >= 0) & (back < window) if window is not None else back >= 0
    if not torch.equal(seen, expected):
        if bool(seen[back < 0].any()):
            raise Refused(path, "attends to later tokens too (a prefix or a bidirectional mask)")
        raise Refused(path, "asks for a mask that is neither causal nor a sliding window (chunked attention?)")
    return window


def _ask(rule: Any, q: Tensor, kv: Tensor) -> Tensor:
    zero = torch.zeros_like(q)
    return torch.as_tensor(rule(zero, zero, q, kv)).expand(q.shape).bool()


def _first_unseen(rule: Any) -> int | None:
    """How many tokens back, itself included, a token far from the beginning sees."""
    back = torch.arange(FAR)
    seen = _ask(rule, torch.full_like(back, 3 * FAR), 3 * FAR - back)
    return None if bool(seen.all()) else int((~seen).int().argmax())


def _window_of_tensor(path: str, mask: Tensor, given: int | None, text: Any) -> int | None:
    """A mask that the model makes itself: numbers on a few tokens, which show no window."""
    sliding = given or getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if mask.device.type == "meta":
        raise NotImplementedError("a mask without numbers")
    seen = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dim() != 4 or mask.shape[-2:] != (TOKENS, TOKENS) or not bool((seen == causal).all()) or sliding:
        raise Refused(path, "makes a mask of its own that is not plainly causal, or biases its scores (ALiBi?)")
    return None


def check_windows(rules: list[Rule], arch: ModelArch, longest: int) -> None:
    """Blocks behind a window are freed by the configuration's rule: it must not be narrower than the layer's."""
    for rule, window in zip(rules, arch.sliding_windows, strict=True):
        if window is not None and (rule.window is None or rule.window > window) and window < longest:
            raise Refused(
                rule.path,
                f"sees {'everything' if rule.window is None else rule.window}, but config.json gives it a window of "
                f"{window}",
            )


def local(model: Model, device: torch.device, tolerance: float) -> None:
    """Raises where the hidden state of a token depends on another token otherwise than through attention, or on its
    place in the step instead of its position."""

    def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Each token sees itself alone, and its query and key leave a trace."""
        group = q.shape[1] // v.shape[1]
        trace = torch.tanh((q * k.repeat_interleave(group, 1)).mean(-1, keepdim=True))
        return (v.repeat_interleave(group, 1) + trace).transpose(1, 2)

    vocab = model.arch.vocab_size
    tokens_T = (torch.arange(TOKENS, device=device) * 7 + 3) % vocab
    positions_T = torch.arange(TOKENS, device=device) + 2
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4], device=device)
    with model.attending(RUN, own):
        straight_TD = model.run(tokens_T, positions_T)
        mixed_TD = model.run(tokens_T[order], positions_T[order])
    if differ(straight_TD[order], mixed_TD) > tolerance:
        raise Refused(
            "",
            "tokens mix outside of attention (a convolution, a state, a shift), or positions are counted by the "
            "model's code instead of read from position_ids: a step of several sequences would be wrong",
        )


def same(model: Model, device: torch.device, dtype: torch.dtype, block: int, tolerance: float) -> None:
    """Raises where quire's attention does not give what the model's own does, on one short sequence."""
    tokens_T = (torch.arange(TOKENS, device=device) * 5 + 1) % model.arch.vocab_size
    positions_T = torch.arange(TOKENS, device=device)
    with model.attending("eager"):
        own_TD = model.run(tokens_T, positions_T)
    step = one_sequence(model.arch, device, dtype, block)
    model.slot.step, model.slot.positions_T = step, positions_T
    try:
        paged_TD = model.run(tokens_T, positions_T)
    finally:
        model.slot.step = model.slot.positions_T = None
    if differ(own_TD, paged_TD) > tolerance:
        raise Refused(
            "", "quire's attention does not give what the model's own (eager) attention does: it has a term of its own"
        )


def one_sequence(arch: ModelArch, device: torch.device, dtype: torch.dtype, block: int) -> Step:
    """A step of `TOKENS` tokens of one new sequence, over pages that all layers share."""
    pages = -(-TOKENS // block)
    pool = torch.zeros((2, pages, block, arch.num_kv_heads, arch.head_dim), dtype=dtype, device=device)
    group = GroupMeta(torch.arange(pages, dtype=torch.int32, device=device)[None], torch.arange(TOKENS, device=device))
    meta = AttentionMeta(
        cu_q=torch.tensor([0, TOKENS], dtype=torch.int32, device=device),
        lengths_R=torch.tensor([TOKENS], dtype=torch.int32, device=device),
        q_lens=[TOKENS],
        max_q=TOKENS,
        max_len=pages * block,
        num_decodes=0,
        groups=(group,),
        kv_lens=[TOKENS],
    )
    return Step(torch.arange(TOKENS, device=device), meta, [(0, pool)] * arch.num_layers)


def differ(a_TD: Tensor, b_TD: Tensor) -> float:
    """Mean distance of `b` from `a`, in their size; 0 where those of `a` are not finite (random weights)."""
    a, b = a_TD.float(), b_TD.float()
    if not bool(torch.isfinite(a).all()):
        return 0.0
    if not bool(torch.isfinite(b).all()):  # what is no number is not above a tolerance either
        return float("inf")
    return float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-12))
