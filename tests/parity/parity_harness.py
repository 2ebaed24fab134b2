"""Tiny random checkpoints, Transformers as the judge, and a hand-made paged step.

Owns: `make_checkpoint` (folders that Transformers and quire both load), `Judge` (Transformers teacher-forced on tokens
that quire chose) and `PagedRun` (a model run directly, without an engine, over permuted pages).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quire.config.arch import ModelArch, arch_from_hf
from quire.config.schema import (
    CacheConfig,
    Config,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from quire.layers.groups import kv_groups
from quire.layers.step import AttentionMeta, GroupMeta, Step

TOLERANCE = 1e-4

_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_OPT = {
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "word_embed_proj_dim": 48,
    "vocab_size": 199,
    "max_position_embeddings": 512,
}
_GPT2 = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "vocab_size": 199,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 199,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MPT = {"d_model": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 199, "max_seq_len": 512, "eos_token_id": 2}
_GEMMA = {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, "num_hidden_layers": 4, "sliding_window": 10, "query_pre_attn_scalar": 20}
_MOE = {**_LLAMA, "moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2}
_BASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "sliding_window": 20}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16}),
    "opt": ("OPTForCausalLM", _OPT),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "falcon": ("FalconForCausalLM", _FALCON),
    "mpt": ("MptForCausalLM", _MPT),
    "phi3": ("Phi3ForCausalLM", _LLAMA),
    "gemma": ("GemmaForCausalLM", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA2),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_MOE, "shared_expert_intermediate_size": 56}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 16}),
}


def make_checkpoint(root: Path, arch: str, **overrides: Any) -> Path:
    """A folder under `root` with a float32 checkpoint of `arch` ("llama", ...), random weights, made once."""
    name, base = _BASES[arch]
    settings = {**base, **overrides}
    digest = hashlib.sha1(json.dumps([name, settings], sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{arch}-{digest}"
    if not folder.exists():
        model_class = getattr(transformers, name)
        torch.manual_seed(int(digest, 16) & 0xFFFF)
        model = model_class(model_class.config_class(**settings))
        liven(model)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Random weights of such size that each layer matters and greedy decoding does not repeat itself."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    gemma = model.config.model_type.startswith("gemma")
    middle = 0.0 if gemma else 1.0  # Gemma's norms add theirs to 1
    embedding = 1.0 if not tied else 0.5 if not gemma else 0.1  # Gemma scales its own
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norm = name.endswith("weight")
            parameter.normal_(middle if norm else 0.0, 0.3 if norm else 0.1)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.normal_(0, embedding)
        else:
            fan_in = parameter.shape[0] if "c_" in name else parameter.shape[-1]
            parameter.normal_(0, 2.0 / fan_in**0.5)


class Judge:
    """Transformers' answers for one checkpoint, float32, eager attention (but for Falcon, whose adds ALiBi twice)."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        falcon = json.loads((folder / "config.json").read_text())["model_type"] == "falcon"
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa" if falcon else "eager",
            trust_remote_code=trust_remote_code,
        ).eval()
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(len(tokens), V) of one whole sequence; line i predicts token i + 1."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = self.model(torch.tensor([key]), use_cache=False).logits[0]
        return self._known[key]


def check_greedy(logits_LV: Tensor, chosen: Sequence[int]) -> None:
    """Each chosen token is the most likely one: exactly so wherever the two best are further apart than the tolerance
    times the spread of the line, else to within it. Line i of `logits_LV` predicts chosen[i]."""
    assert len(logits_LV) == len(chosen)
    for i, token in enumerate(chosen):
        line = logits_LV[i]
        slack = TOLERANCE * float(line.max() - line.min())
        best, second = line.topk(2).values.tolist()
        if best - second > slack:
            assert token == int(line.argmax()), f"token {i}: chose {token}, Transformers {int(line.argmax())}"
        assert best - float(line[token]) <= slack, f"token {i}: {token} is not the maximum: {best - float(line[token])}"


def assert_greedy_matches(
    judge: Judge,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[Mapping[int, float]]] | None = None,
    prompt_logprobs: Sequence[Sequence[Mapping[int, float] | None]] | None = None,
) -> None:
    """Transformers, teacher-forced on quire's own tokens, agrees with every token and every logprob given."""
    for n, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        logits_LV = judge.logits([*prompt, *output])
        start = len(prompt) - 1
        check_greedy(logits_LV[start : start + len(output)], output)
        expected_LV = logits_LV.log_softmax(-1)
        if logprobs is not None:
            assert len(logprobs[n]) == len(output)
            for i, line in enumerate(logprobs[n]):
                check_logprobs(expected_LV[start + i], line, output[i])
        if prompt_logprobs is not None:
            assert len(prompt_logprobs[n]) == len(prompt)
            assert prompt_logprobs[n][0] is None
            for i, given in enumerate(prompt_logprobs[n][1:]):
                assert given is not None
                check_logprobs(expected_LV[i], given, prompt[i + 1])


def check_logprobs(expected_V: Tensor, given: Mapping[int, float], token: int) -> None:
    """Values within 1e-4, the token itself among them, and nothing more likely left out beyond near-ties."""
    assert token in given
    for other, value in given.items():
        assert abs(float(expected_V[other]) - value) <= TOLERANCE, f"logprob of {other}: {value}"
    wanted = min(len(given) - (0 if len(given) <= 1 else 1), len(expected_V))
    if wanted:
        floor = float(expected_V.topk(wanted).values[-1])
        assert sum(value >= floor - 2 * TOLERANCE for value in given.values()) >= wanted


class PagedRun:
    """Sequences run directly through a model: hand-made steps over pages in shuffled order, each page full of nan
    before it is written, block tables of each group on their own."""

    def __init__(self, model: nn.Module, arch: ModelArch, block: int = 4, blocks: int = 400, seed: int = 0) -> None:
        self.model, self.block, self.shift = model, block, 0
        self.groups = kv_groups(arch)
        self.free = list(range(blocks))
        random.Random(seed).shuffle(self.free)
        shape = (2, blocks, block, arch.num_kv_heads, arch.head_dim)
        tensors = [torch.full(shape, torch.nan) for _ in self.groups[0].layers]
        self.kv: list[tuple[int, Tensor]] = [(0, tensors[0])] * arch.num_layers
        for g, group in enumerate(self.groups):
            for i, layer in enumerate(group.layers):
                self.kv[layer] = (g, tensors[i])
        self.lengths: dict[str, int] = {}
        self.tables: dict[str, list[list[int]]] = {}

    def grow(self, name: str, count: int) -> None:
        """Room for `count` more tokens of the sequence."""
        tables = self.tables.setdefault(name, [[] for _ in self.groups])
        self.lengths[name] = self.lengths.get(name, 0) + count
        for table in tables:
            while len(table) * self.block < self.lengths[name]:
                table.append(self.free.pop())

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[str, Sequence[int]]], padding: int = 0) -> dict[str, Tensor]:
        """One ragged batch; rows of one token go first, then `padding` empty rows. Logits (count, V) by name."""
        rows = sorted(rows, key=lambda row: len(row[1]) > 1)
        starts = {name: self.lengths.get(name, 0) for name, _ in rows}
        for name, tokens in rows:
            self.grow(name, len(tokens))
        decodes = [row for row in rows if len(row[1]) == 1]
        rest = rows[len(decodes) :]
        lines = [*decodes, *[("", (0,))] * padding, *rest]
        lengths = [self.lengths[name] if name else 0 for name, _ in lines]
        counts = [len(tokens) for _, tokens in lines]
        longest = -(-max(lengths) // self.block) * self.block
        positions = [starts.get(name, 0) + i + self.shift for name, tokens in lines for i in range(len(tokens))]
        metas = tuple(self._group(g, lines, starts, longest // self.block) for g in range(len(self.groups)))
        meta = AttentionMeta(
            cu_q=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            lengths_R=torch.tensor(lengths, dtype=torch.int32),
            q_lens=counts,
            max_q=max(counts),
            max_len=longest,
            num_decodes=len(decodes) + padding,
            groups=metas,
            kv_lens=lengths,
        )
        tokens_T = torch.tensor([t for _, tokens in lines for t in tokens])
        positions_T = torch.tensor(positions)
        hidden_TD = self.model(tokens_T, positions_T, Step(positions_T, meta, self.kv))
        logits_TV = self.model.compute_logits(hidden_TD)
        parts = logits_TV.split(counts)
        return {name: part for (name, _), part in zip(lines, parts, strict=True) if name}

    def _group(
        self, g: int, lines: Sequence[tuple[str, Sequence[int]]], starts: dict[str, int], width: int
    ) -> GroupMeta:
        tables, slots = [], []
        for name, tokens in lines:
            table = self.tables[name][g] if name else []
            tables.append((table + [0] * width)[:width])
            for at in range(starts.get(name, 0), starts.get(name, 0) + len(tokens)):
                slots.append(table[at // self.block] * self.block + at % self.block if name else -1)
        return GroupMeta(torch.tensor(tables, dtype=torch.int32), torch.tensor(slots))


def config_for(folder: Path, max_len: int | None = None, load_format: str = "auto", dtype: str = "float32") -> Config:
    """What `load_model` asks for, without an engine."""
    arch = arch_from_hf(json.loads((folder / "config.json").read_text()))
    model = ModelConfig(
        model=str(folder),
        path=folder,
        tokenizer=str(folder),
        tokenizer_mode="auto",
        tokenizer_revision=None,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        dtype=dtype,
        seed=0,
        max_model_len=max_len or arch.max_supported_length,
        arch=arch,
    )
    return Config(
        model=model,
        cache=CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
        parallel=ParallelConfig(),
        load=LoadConfig(load_format=load_format),
        device=DeviceConfig(),
        observability=ObservabilityConfig(),
    )
