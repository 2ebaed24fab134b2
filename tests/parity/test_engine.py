"""The whole engine against Transformers: one batch of prompts of very different lengths through a pool so small that
sequences are preempted, in chunks, with shared prefixes, samples that share a prompt's blocks, and beams."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import parity_harness as harness
import pytest
from torch import Tensor

from quire import LLM, SamplingParams
from quire.layers.attention import Attention
from quire.layers.step import Step
from quire.ops.native.library import load
from quire.runner.replay import HostReplay, NoReplay
from quire.types.outputs import RequestOutput
from quire.types.params import BeamSearchParams

LONG = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, **LONG}
MIXED = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 8.0],
}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 0.5}
ODD = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "grouped", {}),
    ("llama", "odd-tied", {**ODD, "tie_word_embeddings": True, "attention_bias": True}),
    ("llama", "linear", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", "dynamic", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", "llama3", {"rope_parameters": LLAMA3}),
    ("llama", "yarn", {"rope_parameters": YARN}),
    ("mistral", "window", {"sliding_window": 10}),
    ("mistral", "no-window", {"sliding_window": None}),
    ("qwen2", "biases", {}),
    ("qwen2", "mixed-windows", {**MIXED, "max_window_layers": 2}),
    ("qwen2", "one-full-two-sliding", {**MIXED, "num_hidden_layers": 3, "max_window_layers": 1}),
    ("qwen3", "head-norm", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    ("qwen3", "tied-wide", {"tie_word_embeddings": True, "head_dim": 20}),
    ("opt", "125m", {}),
    ("opt", "350m", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    ("gpt2", "plain", {}),
    ("gpt2", "scaled-untied", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    ("falcon", "7b", {"num_attention_heads": 3}),
    ("falcon", "40b", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "rw", FALCON_RW),
    ("mpt", "alibi", {"n_heads": 3}),
    ("mpt", "clipped", {"attn_config": {"clip_qkv": 1.5}, "tie_word_embeddings": False}),
    ("phi3", "window", {"sliding_window": 9}),
    (  # positions of twice the original length at most: with four times as many, the larger attention factor makes
        # Transformers' own float32 differ by 9e-5 from its float64
        "phi3",
        "longrope-within",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 128,
            "max_position_embeddings": 256,
        },
    ),
    (
        "phi3",
        "longrope-beyond",
        {"rope_parameters": {**LONGROPE, "attention_factor": 1.1}, "original_max_position_embeddings": 16},
    ),
    ("mixtral", "experts", {}),
    ("qwen2_moe", "shared-expert", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    ("qwen3_moe", "experts", {"norm_topk_prob": True}),
    ("gemma", "1", {"num_key_value_heads": 1}),
    ("gemma2", "soft-caps", CAPS),
    ("gemma3", "local-and-global", LOCAL),
]
IDS = [f"{arch}-{name}" for arch, name, _ in CASES]
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 4, 17)
MAX_LEN, BLOCK, NEW = 128, 4, 18


def engine(folder: Path, **changes: Any) -> AbstractContextManager[LLM]:
    """Room for one longest sequence and little more in each group, and steps shorter than most prompts."""
    groups = harness.kv_groups(harness.config_for(folder).model.arch, MAX_LEN)
    longest = sum(MAX_LEN if group.window is None else group.window + 24 for group in groups)
    return engine_of(folder, **{"num_gpu_blocks_override": longest // BLOCK + 3 * len(groups), **changes})


@contextmanager
def engine_of(folder: Path, **changes: Any) -> Iterator[LLM]:
    """Short steps, small blocks, and whatever pool is asked for."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "block_size": BLOCK,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    llm = LLM(model=str(folder), **{**settings, **changes})
    try:
        yield llm
    finally:
        llm.llm_engine.shutdown()


def batch(vocab: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of all lengths, four of them with one long beginning, and sampled requests with n > 1 among them."""
    draw = random.Random(7)
    prompts = [[draw.randrange(3, vocab) for _ in range(count)] for count in LENGTHS]
    shared = [draw.randrange(3, vocab) for _ in range(30)]
    prompts += [[*shared, *[draw.randrange(3, vocab) for _ in range(count)]] for count in (0, 1, 6, 11)]
    common: dict[str, Any] = {"max_tokens": NEW, "ignore_eos": True, "detokenize": False, "logprobs": 5}
    params = [
        SamplingParams(temperature=0.0, prompt_logprobs=5 if i % 3 == 0 else None, **common)
        for i in range(len(prompts))
    ]
    for n, count in ((2, 9), (3, 41)):
        prompts.append([draw.randrange(3, vocab) for _ in range(count)])
        params.append(SamplingParams(n=n, temperature=1.0, seed=n, **common))
    return prompts, params


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    return outputs


def values(lines: Any) -> list[Any]:
    """Logprob objects as plain numbers, with the ranks checked."""
    plain = []
    for line in lines:
        if line is not None:
            ranked = sorted((entry.rank, -entry.logprob) for entry in line.values())
            assert [score for _, score in ranked] == sorted(score for _, score in ranked)
        plain.append(None if line is None else {token: entry.logprob for token, entry in line.items()})
    return plain


def check(judge: harness.Judge, outputs: list[RequestOutput], params: list[SamplingParams]) -> None:
    """Greedy requests by the greedy rule, sampled ones by their logprobs; every token of every sequence."""
    for output, asked in zip(outputs, params, strict=True):
        prompt = output.prompt_token_ids
        assert len(output.outputs) == asked.n
        for sequence in output.outputs:
            tokens = list(sequence.token_ids)
            assert len(tokens) == NEW
            assert sequence.finish_reason == "length"
            given = values(sequence.logprobs)
            if asked.temperature == 0.0:
                prompt_logprobs = None if asked.prompt_logprobs is None else [values(output.prompt_logprobs)]
                harness.assert_greedy_matches(judge, [prompt], [tokens], [given], prompt_logprobs)
            else:
                expected_LV = judge.logits([*prompt, *tokens]).log_softmax(-1)[len(prompt) - 1 :]
                for i, token in enumerate(tokens):
                    harness.check_logprobs(expected_LV[i], given[i], token)
            total = sum(line[token] for line, token in zip(given, tokens, strict=True))
            assert sequence.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert len({tuple(s.token_ids) for output in outputs[-2:] for s in output.outputs}) == 5


@pytest.mark.parametrize(("arch", "name", "overrides"), CASES, ids=IDS)
def test_engine_equals_transformers(
    checkpoint: Callable[..., Path], arch: str, name: str, overrides: dict[str, Any]
) -> None:
    folder = checkpoint(arch, **overrides)
    judge = harness.Judge(folder)
    prompts, params = batch(199)
    with engine(folder) as llm:
        outputs = run(llm, prompts, params)
        stats = llm.llm_engine.stat_logger.stats
        assert stats.preemptions > 0, "the pool was not small enough"
        assert stats.prefix_hits > 0, "nothing was shared"
        assert stats.blocks_used == 0, "blocks leaked"
    greedy = [tokens for output in outputs[:-2] for tokens in output.outputs[0].token_ids]
    assert len(set(greedy)) >= 10, "greedy decoding repeats itself"
    check(judge, outputs, params)


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True},
        {"async_scheduling": False},
        {"enable_prefix_caching": False, "block_size": 16, "num_gpu_blocks_override": 12},
        {"max_num_batched_tokens": 512, "max_num_seqs": 32, "num_gpu_blocks_override": 900},
        {"swap_space": 0.01},
        {"max_num_seqs": 2, "max_num_batched_tokens": 3, "scheduling_policy": "priority"},
        {"ops": {"*": "reference"}},
        {"enforce_eager": True},
    ],
    ids=["overlapped", "one-at-a-time", "no-prefix-cache", "roomy", "swapping", "cramped", "reference-ops", "eager"],
)
@pytest.mark.parametrize(
    ("arch", "overrides"), [("llama", {}), ("qwen2", {**MIXED, "max_window_layers": 2})], ids=["full", "mixed"]
)
def test_every_setting_gives_the_same(
    checkpoint: Callable[..., Path], arch: str, overrides: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = checkpoint(arch, **overrides)
    if overrides and "num_gpu_blocks_override" in changes:
        changes = {**changes, "num_gpu_blocks_override": 2 * changes["num_gpu_blocks_override"]}
    prompts, params = batch(199)
    with engine(folder, **changes) as llm:
        check(harness.Judge(folder), run(llm, prompts, params), params)


RECORDED = {"falcon": HostReplay, "mpt": HostReplay, "phi3": HostReplay, "gemma2": HostReplay, "gemma3": HostReplay}


@pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
@pytest.mark.parametrize(("arch", "replay"), [*RECORDED.items(), ("mixtral", NoReplay), ("qwen2_moe", NoReplay)])
def test_which_models_are_recorded_on_a_cpu(checkpoint: Callable[..., Path], arch: str, replay: type[Any]) -> None:
    """Mixtures are not: who chose which expert decides what there is to compute."""
    with engine(checkpoint(arch), device="cpu") as llm:
        client: Any = llm.llm_engine.client
        assert type(client._executor.worker._runner._replay) is replay


Forward = Callable[..., Tensor]


def swap_two_blocks(
    forward: Forward, self: Attention, q: Tensor, k: Tensor, v: Tensor, at: Tensor, step: Step
) -> Tensor:
    """The first two rows read each other's second page."""
    groups = []
    for group in step.attn.groups:
        tables = group.block_tables_RP.clone()
        if tables.shape[0] > 1 and tables.shape[1] > 1:
            tables[:2, 1] = tables[:2, 1].flip(0)
        groups.append(dataclasses.replace(group, block_tables_RP=tables))
    meta = dataclasses.replace(step.attn, groups=tuple(groups))
    return forward(self, q, k, v, at, dataclasses.replace(step, attn=meta))


def drop_the_window(forward: Forward, self: Attention, *rest: Any) -> Tensor:
    self.window = None
    return forward(self, *rest)


def shift_positions(
    forward: Forward, self: Attention, q: Tensor, k: Tensor, v: Tensor, at: Tensor, step: Step
) -> Tensor:
    """Tokens from the eleventh on claim to stand one further than they do."""
    return forward(self, q, k, v, at + (at >= 10), step)


@pytest.mark.parametrize(
    ("arch", "break_it"), [("llama", swap_two_blocks), ("mistral", drop_the_window), ("llama", shift_positions)]
)
def test_the_check_fails_when_something_is_wrong(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arch: str, break_it: Callable[..., Tensor]
) -> None:
    folder = checkpoint(arch)
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *rest: break_it(forward, self, *rest))
    prompts, params = batch(199)
    with engine(folder, num_gpu_blocks_override=400, enable_prefix_caching=False) as llm:
        outputs = run(llm, prompts, params)
    with pytest.raises(AssertionError):
        check(harness.Judge(folder), outputs, params)


def plain_beams(
    judge: harness.Judge, prompt: list[int], params: BeamSearchParams, eos: int
) -> list[tuple[list[int], float, float]]:
    """vLLM's rules in a plain loop: (tokens, summed logprob, score), best first. Each beam offers its 2k most likely
    tokens; end tokens complete a beam, the k best others go on; the score counts the prompt's tokens but no end token.
    """

    def score(tokens: list[int], total: float) -> float:
        ended = not params.ignore_eos and tokens[-1] == eos
        return total / (len(tokens) - ended) ** params.length_penalty

    beams: list[tuple[list[int], float]] = [(prompt, 0.0)]
    done: list[tuple[list[int], float]] = []
    for _ in range(params.max_tokens):
        grown: list[tuple[list[int], float]] = []
        for tokens, total in beams:
            best = judge.logits(tokens)[-1].log_softmax(-1).topk(2 * params.beam_width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                ends = token == eos and not params.ignore_eos
                (done if ends else grown).append(([*tokens, token], total + value))
        beams = sorted(grown, key=lambda beam: score(*beam), reverse=True)[: params.beam_width]
    scored = [(tokens, total, score(tokens, total)) for tokens, total in [*done, *beams]]
    return sorted(scored, key=lambda beam: beam[2], reverse=True)[: params.beam_width]


@pytest.mark.parametrize(
    ("width", "length_penalty", "ignore_eos"), [(1, 1.0, False), (3, 1.0, False), (4, 0.0, False), (4, 2.0, True)]
)
def test_beams_equal_a_plain_loop(
    checkpoint: Callable[..., Path], width: int, length_penalty: float, ignore_eos: bool
) -> None:
    eos = 77
    folder = checkpoint("llama", eos_token_id=eos)
    judge = harness.Judge(folder)
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 199) for _ in range(count)] for count in (1, 4, 9, 30, 61)]
    params = BeamSearchParams(beam_width=width, max_tokens=9, length_penalty=length_penalty, ignore_eos=ignore_eos)
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    with engine(folder) as llm:
        outputs = llm.beam_search(inputs, params)
        assert llm.llm_engine.stat_logger.stats.blocks_used == 0, "blocks leaked"
    ended = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = plain_beams(judge, prompt, params, eos)
        got = output.sequences
        assert len(got) == len(expected)
        known = {tuple(tokens): total for tokens, total, _ in expected}
        for i, (beam, (tokens, total, score)) in enumerate(zip(got, expected, strict=True)):
            assert beam.cum_logprob == pytest.approx(total, abs=harness.TOLERANCE)
            near = [j for j, other in enumerate(expected) if j != i and abs(other[2] - score) < harness.TOLERANCE]
            assert beam.tokens == tokens or near, f"beam {i}: {beam.tokens} instead of {tokens}"
            assert tuple(beam.tokens) in known or i in (len(expected) - 1, *near)
            ended += tokens[-1] == eos
    assert ignore_eos or width == 1 or ended, "no beam met an end token: choose another"
