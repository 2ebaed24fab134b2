"""An encoder that runs from its own Transformers code, over the texts of a step laid end to end.

Owns: the attention that keeps texts apart, the body between token ids and hidden states, and the head for classes that
the model's code has. Shape legend: T tokens of all texts, L of one, N texts of one length, H heads, E head size, D
hidden.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling

from quire.config.schema import Config
from quire.layers.slots import SlotModule
from quire.models.pooling import project
from quire.models.transformers.build import make
from quire.models.transformers.checkpoint import Names
from quire.models.transformers.describe import hf_config
from quire.models.transformers.encoders import encoder_class, first_position
from quire.models.transformers.leaves import own_slots, replace_leaves
from quire.ops.dispatch import Binder
from quire.types.errors import ClientError
from quire.types.pooling import CLASSIFY, EMBED, TOKEN_CLASSIFY

ENCODER = "quire_encoder"
TEXTS = "quire_texts"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
TRIED = (5, 9, 5)  # lengths of the texts that a model is tried on
# Beginnings of names that a checkpoint with another head has.
_OTHER_HEADS = (
    "pooler.", "cls.", "lm_head.", "classifier.", "score.", "head.", "decoder.", "vocab_", "predictions.",
    "generator_", "discriminator_", "qa_outputs.", "pre_classifier.",
)  # fmt: skip


class Texts:
    """Where the texts of the step are: those of one length together, as (their tokens' places, N, L). One for each
    model, set before its forward and cleared after."""

    def __init__(self) -> None:
        self.groups: list[tuple[Tensor, int, int]] | None = None
        self.masks: dict[tuple[Any, int], Tensor | None] = {}

    def set(self, lengths: Sequence[int], device: torch.device) -> None:
        begins = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        places: dict[int, list[int]] = defaultdict(list)
        for begin, length in zip(begins, lengths, strict=True):
            places[length] += range(begin, begin + length)
        self.masks = {}
        self.groups = [(torch.tensor(at, device=device), len(at) // length, length) for length, at in places.items()]

    def mask(self, rule: Any, length: int, device: torch.device) -> Tensor | None:
        """Which keys each query of a text sees; None: all."""
        if rule is None:
            return None
        key = (rule, length)
        if key not in self.masks:
            q, k = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None]
            zero = torch.zeros((), dtype=torch.long, device=device)
            seen = torch.as_tensor(rule(zero, zero, q, k), device=device).expand(length, length)
            self.masks[key] = None if bool(seen.all()) else seen
        return self.masks[key]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """q (1, H, T, E), k and v (1, K, T, E) -> (1, T, H, E)."""
    texts: Texts = getattr(module, TEXTS)
    assert texts.groups is not None, "a model runs outside of a step"
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ClientError(f"attention with {name} is not there for encoders", "model", name)
    out_THE = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))
    rule = getattr(attention_mask, "rule", None)
    for at, count, length in texts.groups:
        q, k, v = (x[0][:, at].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        seen = texts.mask(rule, length, query.device)
        grouped = k.shape[1] != q.shape[1]
        found = F.scaled_dot_product_attention(q, k, v, seen, scale=kwargs.get("scaling"), enable_gqa=grouped)
        out_THE[at] = found.transpose(1, 2).flatten(0, 1)
    return out_THE[None], None


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    """A mask without numbers; its `rule` is a function (batch, head, query, key) -> whether the key is seen."""
    out = torch.zeros((1, 1, 1, 1), device=kwargs.get("device", "cpu"))
    out.rule = kwargs.get("mask_function")  # type: ignore[attr-defined]
    return out


class TransformersEncoder(SlotModule):
    """The module tree has the names of the model's own code."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        pooling, arch, trusted = config.pooling, config.model.arch, config.model.trust_remote_code
        assert pooling is not None
        self.arch = arch
        head = EMBED if pooling.kind == EMBED else TOKEN_CLASSIFY if pooling.per_token else CLASSIFY
        hf = hf_config(arch.extra, config.model.path, trusted)
        if pooling.kind != EMBED:
            hf.num_labels = len(pooling.labels)
        made = encoder_class(hf, arch.extra, config.model.path, trusted, head)
        takes_pooler = head == EMBED and "add_pooling_layer" in inspect.signature(made.__init__).parameters
        whole = make(made, hf, dtype, **({"add_pooling_layer": False} if takes_pooler else {}))
        self.prefix = whole.base_model_prefix
        self.unused = _OTHER_HEADS if head == EMBED else (f"{self.prefix}.pooler.",)
        names = Names(whole)
        self.rename, self.translate = names.rename, names.translate
        body = whole if head == EMBED else getattr(whole, self.prefix)
        takes = inspect.signature(body.forward).parameters
        if "position_ids" not in takes:
            text = f"{type(body).__name__} takes no position_ids: it counts positions itself, over all texts of a step"
            raise ClientError(text, "model", arch.architecture)
        self._types = "token_type_ids" in takes
        self._last_type = max(0, int(getattr(hf, "type_vocab_size", None) or 1) - 1)
        self._first = first_position(made, hf)
        self._texts = _install(whole)
        replace_leaves(whole, {}, arch.vocab_size)
        for name, child in whole.named_children():
            self.add_module(name, child)
        self._whole, self._body = (whole,), (body,)  # in tuples, so as not to be submodules
        self._answer = _Body(body)
        if body is not whole:
            whole._modules[self.prefix] = self._answer
        self.dense = nn.ModuleList()
        own_slots(self)

    def encode(self, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int], types_T: Tensor) -> Tensor:
        """Hidden states (T, D) of texts laid end to end. `types_T`: of a pair of texts, which one a token is of."""
        (body,) = self._body
        kwargs = {"token_type_ids": types_T.clamp(max=self._last_type)[None]} if self._types else {}
        self._texts.set(lengths, tokens_T.device)
        try:
            out = body(input_ids=tokens_T[None], position_ids=(positions_T + self._first)[None], **kwargs)
        finally:
            self._texts.groups = None
        return out[0][0]

    def classify(self, hidden_LD: Tensor) -> Tensor:
        """Logits of one text, by the model's own head: of its classes, or of each token's."""
        (whole,) = self._whole
        self._answer.hidden = hidden_LD[None]
        try:
            ids = torch.ones((1, len(hidden_LD)), dtype=torch.long, device=hidden_LD.device)
            return whole(input_ids=ids, attention_mask=ids).logits[0].float()
        finally:
            self._answer.hidden = None

    def project(self, x_SD: Tensor) -> Tensor:
        return project(self.dense, x_SD)

    def build(self, length: int, device: torch.device) -> None:
        """Computed buffers follow the weights."""
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.device.type != "meta":
                    setattr(module, name, buffer.to(device))

    @torch.inference_mode()
    def prove(self, config: Config, device: torch.device, dtype: torch.dtype, ops: Binder) -> None:
        """Texts end to end give what each gives alone, by the model's own attention. Raises `ClientError`."""
        (body,) = self._body
        vocab, lengths = self.arch.vocab_size, [min(n, config.model.max_model_len) for n in TRIED]
        random = torch.Generator().manual_seed(0)
        low = vocab // 2  # special tokens, the padding among them, come first
        tokens = [torch.randint(low, vocab, (n,), generator=random).to(device) for n in lengths]
        positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
        try:
            found = self.encode(torch.cat(tokens), positions_T, lengths, torch.zeros_like(positions_T)).split(lengths)
            body.config._attn_implementation = "eager"
            alone = [body(input_ids=t[None], attention_mask=torch.ones_like(t)[None])[0][0] for t in tokens]
        except ClientError:
            raise
        except Exception as error:  # the model's own code
            text = next(iter(str(error).splitlines()), "")
            told = f"{self.arch.architecture} from Transformers' code fails on a step of a few tokens"
            raise ClientError(f"{told} ({type(error).__name__}: {text})", "model") from error
        finally:
            body.config._attn_implementation = ENCODER
        for mine, theirs in zip(found, alone, strict=True):
            distance = float((mine - theirs).float().norm() / theirs.float().norm().clamp(min=1e-6))
            if not distance <= TOLERANCE[dtype]:
                text = f"{self.arch.architecture} gives other numbers for several texts in a step than for each alone"
                raise ClientError(f"{text} (they differ by {distance:.2g}), so it cannot run here", "model")


def _install(whole: Any) -> Texts:
    """Gives every module of the model its `Texts`, and makes the interface known."""
    register: Callable[..., None] = AttentionInterface.register
    register(ENCODER, _attend)
    AttentionMaskInterface.register(ENCODER, _mask)
    texts = Texts()
    for module in whole.modules():
        object.__setattr__(module, TEXTS, texts)
    whole.config._attn_implementation = ENCODER
    return texts


class _Body(nn.Module):
    """Answers for a body with given hidden states."""

    hidden: Any = None

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self._of = (body,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pooler = getattr(self._of[0], "pooler", None)
        pooled = None if pooler is None else pooler(self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)
