"""A model that runs from its own Transformers code, as the runner sees it (`models.base.CausalLM`'s methods).

Owns: the body between token ids and hidden states, quire's head, and what the model's code does to the logits.
Shape legend: T tokens, S sampled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from quire.config.schema import Config
from quire.layers.linear import LMHead
from quire.layers.slots import SlotModule
from quire.layers.step import Step
from quire.models.base import Decoder
from quire.models.transformers import proof
from quire.models.transformers.build import build
from quire.models.transformers.checkpoint import Names
from quire.models.transformers.fused import replace_activations, replace_gated
from quire.models.transformers.hook import PAGED, RUN, PagedAttention, install
from quire.models.transformers.inplace import replace_attention
from quire.models.transformers.leaves import own_slots, replace_leaves
from quire.models.transformers.likeness import likeness
from quire.ops.dispatch import Binder
from quire.types.errors import ClientError

log = logging.getLogger(__name__)

# Mean relative distance of hidden states beyond which two runs are not the same: roundings are far below it, mistakes
# above.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class OwnHead(LMHead):
    """A head that may have a bias."""

    bias: Tensor | None

    def __init__(self, size: int, vocab_size: int, tied: Any, bias: bool) -> None:
        super().__init__(size, vocab_size, tied)
        if bias:
            self.add_slot("bias", (vocab_size,))
        else:
            self.no_slot("bias")

    def forward(self, hidden_SD: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        return self.op(hidden_SD, self.weight, self.bias, dtype)


class TransformersForCausalLM(SlotModule):
    """`prefix`: the body's name in the checkpoint. The module tree has the names of the model's own code."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.arch = arch = config.model.arch
        self.fused = False  # whether attention is quire's operations, not only its pages
        whole = build(arch.extra, config.model.path, config.model.trust_remote_code, dtype)
        self.prefix, body, head_name, head = _parts(whole)
        names = Names(whole)
        self.rename, self.translate = names.rename, names.translate
        table = whole.get_input_embeddings()
        embedding = next(path for path, module in body.named_modules() if module is table)
        whole.config._attn_implementation = RUN
        self._slot = install(body)
        self._trial = proof.Model(self.prefix, body, whole.config, self._slot, arch)
        rules = self._early(config)
        native = None if rules is None else likeness(whole, self.prefix, body, arch, list(rules.values()))
        self._logits = LogitsRule(whole, self.prefix, body, head_name, head)
        if native is None:
            plan = getattr(whole.config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}
            self.fused = rules is not None and replace_attention(whole, self.prefix, body, arch, rules)
            replace_gated(body)
            replace_activations(body)
            replace_leaves(body, plan, arch.vocab_size)
        how = "with quire's attention" if self.fused else "its attention over quire's pages"
        how = how if native is None else "in quire's blocks, which compute the same"
        log.info("%s runs from Transformers' code, %s", type(whole).__name__, how)
        shown = body if native is None else native
        self.add_module(self.prefix, shown)
        outputs, inputs = head.weight.shape
        self._head_name = head_name
        tied = shown.get_submodule(embedding) if table.weight is head.weight else None
        self.add_module(head_name, OwnHead(inputs, outputs, tied, head.bias is not None))
        own_slots(self)

    @property
    def native(self) -> Decoder | None:
        """quire's blocks, where they take the place of the model's own code."""
        body = self._modules[self.prefix]
        return body if isinstance(body, Decoder) else None

    @property
    def head(self) -> OwnHead:
        module = self._modules[self._head_name]
        assert isinstance(module, OwnHead)
        return module

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        """Token ids and positions of the ragged batch -> hidden states (T, D)."""
        if (native := self.native) is not None:
            return native(tokens_T, positions_T, step)
        slot = self._slot
        slot.step, slot.positions_T = step, positions_T
        try:
            return self._trial.run(tokens_T, positions_T)
        finally:
            slot.step = slot.positions_T = None

    def compute_logits(self, hidden_SD: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Logits (S, V) of some hidden states; see `CausalLM`."""
        return self._logits(self.head, hidden_SD, dtype)

    def build(self, length: int, device: torch.device) -> None:
        """Computed buffers follow the weights."""
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.device.type != "meta":  # those of quire's own layers are made by them
                    setattr(module, name, buffer.to(device))

    def _early(self, config: Config) -> dict[nn.Module, proof.Rule] | None:
        """The rules of the layers before weights are read, as far as shapes alone tell them."""
        meta, body = torch.device("meta"), self._trial.body
        buffers = [(m, n, b) for m in body.modules() for n, b in m.named_buffers(recurse=False)]
        for module, name, buffer in buffers:
            setattr(module, name, buffer.to(meta))
        try:
            with torch.inference_mode():
                return self._examine(meta, config)
        except ClientError:
            raise
        except Exception as error:  # its code looks at numbers: then the trial waits for the weights
            log.debug("shapes alone do not tell how %s attends: %s", self.arch.architecture, error)
            return None
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)

    def _examine(self, device: torch.device, config: Config) -> dict[nn.Module, proof.Rule]:
        freeze_rotary(self._trial.body, config.model.max_model_len)
        rules = proof.facts(self._trial, device)
        proof.check_windows(list(rules.values()), self.arch, config.model.max_model_len)
        return rules

    @torch.inference_mode()
    def prove(self, config: Config, device: torch.device, dtype: torch.dtype, ops: Binder) -> None:
        """Gives each layer its attention, then tries the whole. Raises `ClientError` for what would be wrong."""
        if self.native is not None:
            return
        if self.fused:  # shown before, but for what surrounds the attention
            proof.local(self._trial, device, TOLERANCE[dtype])
            return
        try:
            for layer, (module, rule) in enumerate(self._examine(device, config).items()):
                module.add_module(PAGED, paged := paged_attention(self.arch, layer, rule))
                paged.build(config.model.max_model_len, device)
                paged.heads.bind(ops)
                paged.bind(ops)
            proof.local(self._trial, device, TOLERANCE[dtype])
            proof.same(self._trial, device, dtype, config.cache.block_size, TOLERANCE[dtype])
        except ClientError:
            raise
        except Exception as error:  # the model's own code
            text = next(iter(str(error).splitlines()), "")
            raise ClientError(
                f"{self.arch.architecture} from Transformers' code fails on a step of a few tokens "
                f"({type(error).__name__}: {text})",
                "model",
            ) from error


def _parts(whole: Any) -> tuple[str, nn.Module, str, Any]:
    """(the body's name, body, the head's name, head). Raises `ClientError` where the model is not made of these two."""
    prefix = whole.base_model_prefix if hasattr(whole, whole.base_model_prefix) else "model"
    body, head = getattr(whole, prefix, None), whole.get_output_embeddings()
    name = next((name for name, module in whole.named_children() if module is head), None)
    if not isinstance(body, nn.Module) or name is None or getattr(head, "weight", None) is None:
        raise ClientError(
            f"{type(whole).__name__} is not made of a body and one linear head, which quire's sampling needs", "model"
        )
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise ClientError(
            f"{type(body).__name__} takes no position_ids: it counts positions itself, which is wrong for a step of "
            "several sequences",
            "model",
        )
    return prefix, body, name, head


def paged_attention(arch: Any, layer: int, rule: proof.Rule) -> PagedAttention:
    paged = PagedAttention(arch, layer, scale=rule.scale)
    paged.num_heads, paged.num_kv_heads, paged.head_dim = rule.heads, rule.kv_heads, rule.head_dim
    paged.window, paged.softcap = rule.window, rule.softcap
    paged.value_size = rule.value_dim if rule.value_dim != rule.head_dim else None
    return paged


def freeze_rotary(body: nn.Module, longest: int) -> None:
    """Rotary frequencies that follow the longest sequence of a batch would make a token depend on its neighbours. They
    are those of short sequences as long as none is longer than the model was made for; beyond it is refused."""
    for path, module in body.named_modules():
        kinds: Any = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind not in ("dynamic", "longrope"):
                continue
            config: Any = module.config
            text = config.get_text_config(decoder=True)
            scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
            first = scaling.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            most = int(first or text.max_position_embeddings)
            if longest > most:
                raise proof.Refused(
                    path,
                    f"rope scaling {kind!r} turns all tokens by the length of the longest sequence, which is wrong for "
                    f"a step of several: set max_model_len to at most {most}",
                )
            if not isinstance(kinds, dict):
                module.rope_type = "default"  # type: ignore[assignment]


class LogitsRule:
    """What a model's code does between its body and its logits, learnt by trying it with a body and a head that
    answer with given numbers: nothing, a factor, a soft cap, or (`None`) something that its own code has to do."""

    def __init__(self, whole: Any, prefix: str, body: nn.Module, head_name: str, head: Any) -> None:
        self._whole = whole
        vocab, size = head.weight.shape
        self._answers = _Body(body), _Head()
        others = {id(p) for n, p in whole.named_parameters() if not n.startswith((f"{prefix}.", f"{head_name}."))} - {
            id(p) for p in body.parameters()
        }
        if others:
            raise ClientError(f"{type(whole).__name__} has weights beside its body and its head", "model")
        whole._modules[prefix], whole._modules[head_name] = self._answers
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn((3, size), generator=random)
        given = torch.randn((3, vocab), generator=random) * torch.tensor([1.0, 30.0, 300.0]).view(3, 1)
        asked: list[Tensor] = []

        def answer(x: Tensor) -> Tensor:
            asked.append(x)
            return given[None]

        out = self._own(hidden, answer)
        if len(asked) != 1 or not torch.equal(asked[0][0], hidden):
            self.factor, self.cap = None, None
        else:
            self.factor, self.cap = _factor_and_cap(given, out)

    def __call__(self, head: OwnHead, hidden_SD: Tensor, dtype: torch.dtype | None) -> Tensor:
        if self.factor is None:
            return self._own(hidden_SD, lambda x: head(x, torch.float32))
        plain = self.factor == 1.0 and self.cap is None
        logits_SV = head(hidden_SD, dtype if plain else torch.float32)
        if plain:
            return logits_SV
        logits_SV = logits_SV * self.factor
        return logits_SV if self.cap is None else torch.tanh(logits_SV / self.cap) * self.cap

    def _own(self, hidden_SD: Tensor, head: Any) -> Tensor:
        body_answer, head_answer = self._answers
        body_answer.hidden, head_answer.head = hidden_SD[None], head
        ids = torch.zeros((1, hidden_SD.shape[0]), dtype=torch.long, device=hidden_SD.device)
        try:
            return self._whole(input_ids=ids, position_ids=ids, use_cache=False).logits[0]
        finally:
            body_answer.hidden, head_answer.head = None, None


def _factor_and_cap(given: Tensor, out: Tensor) -> tuple[float | None, float | None]:
    """(factor, cap) such that out = cap * tanh(given * factor / cap); cap None for a mere factor; (None, None) where
    it is neither."""
    factor = float(out[0].double().norm() / given[0].double().norm())
    for exact in (1.0, factor):
        if torch.allclose(out, given * exact, rtol=1e-5, atol=1e-6):
            return exact, None
    cap = float(out.abs().max())
    if torch.allclose(out, torch.tanh(given / cap) * cap, rtol=1e-4, atol=1e-5):
        return 1.0, cap
    return None, None


class _Answer(tuple[Tensor]):
    """Hidden states as the first output of a body; any other output is absent."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Body(nn.Module):
    """Answers for `body`, with given hidden states."""

    hidden: Any = None

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self._of = (body,)  # in a tuple, so as not to be a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Answer((self.hidden,))

    def __getattr__(self, name: str) -> Any:
        """Some heads call a part of their body (`model.decoder`), which answers alike, or read a number of it."""
        value = getattr(self.__dict__["_of"][0], name)
        return self if isinstance(value, nn.Module) else value


class _Head(nn.Module):
    head: Any = None
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
