"""Each architecture, run directly over permuted pages, against Transformers' logits: prompts of very different lengths
in one ragged batch, some in chunks, then decode steps mixed with late prompts and padding rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity_harness as harness
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.loading import load_model
from quire.ops.dispatch import Binder

CPU = torch.device("cpu")

LONG = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, **LONG}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
NEW_DECODER = {"new_decoder_architecture": True, "num_kv_heads": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 8.0],
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
NARROW = {"word_embed_proj_dim": 24, "do_layer_norm_before": False}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "grouped", {}),
    (
        "llama",
        "multi-query-odd-heads",
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10},
    ),
    ("llama", "wide-heads", {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ("llama", "tied-biases", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", "gelu", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    ("llama", "rope-theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", "rope-linear", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", "rope-dynamic", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", "rope-llama3", {"rope_parameters": LLAMA3}),
    ("llama", "rope-yarn", {"rope_parameters": YARN}),
    ("llama", "rope-yarn-mscale", {"rope_parameters": {**YARN, **MSCALE}}),
    ("llama", "rope-yarn-attention-factor", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    ("mistral", "window", {}),
    ("mistral", "window-of-one-page", {"sliding_window": 4, "num_key_value_heads": 4}),
    ("mistral", "no-window", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", "biases", {}),
    (
        "qwen2",
        "window-in-late-layers",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    (
        "qwen2",
        "window-mixed",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    ("qwen3", "head-norm", {}),
    ("qwen3", "head-norm-odd", {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True}),
    ("qwen3", "yarn-tied", {"rope_parameters": {**YARN, "rope_theta": 1e6}, "tie_word_embeddings": True}),
    ("opt", "125m", {}),
    ("opt", "350m", NARROW),
    ("opt", "bare", {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
    ("opt", "no-final-norm", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ("gpt2", "plain", {}),
    ("gpt2", "scaled", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "activation_function": "gelu"}),
    ("gpt2", "unscaled-untied", {"scale_attn_weights": False, "tie_word_embeddings": False, "n_head": 4}),
    ("falcon", "7b", {"num_attention_heads": 3}),
    (
        "falcon",
        "7b-biases",
        {"bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3}},
    ),
    (
        "falcon",
        "7b-alibi-serial",
        {"alibi": True, "parallel_attn": False, "num_attention_heads": 6, "tie_word_embeddings": False},
    ),
    ("falcon", "40b", NEW_DECODER),
    ("falcon", "11b-one-norm", {**NEW_DECODER, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
    ("falcon", "rw", FALCON_RW),
    ("mpt", "alibi", {}),
    ("mpt", "clipped", {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}, "tie_word_embeddings": False}),
    ("mpt", "odd-heads", {"n_heads": 3, "tie_word_embeddings": False}),
    ("phi3", "packed", {"num_key_value_heads": 4}),
    ("phi3", "window", {"sliding_window": 9, "num_key_value_heads": 1}),
    ("phi3", "partial-rotary", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}),
    ("phi3", "longrope-beyond", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12}),
    ("mixtral", "experts", {}),
    ("mixtral", "window-one-expert", {"sliding_window": 9, "num_experts_per_tok": 1}),
    ("qwen2_moe", "shared-expert", {}),
    ("qwen2_moe", "windows", {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": True}),
    ("qwen2_moe", "some-layers-dense", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]}),
    ("qwen3_moe", "experts", {"norm_topk_prob": True}),
    ("qwen3_moe", "unnormalised", {"mlp_only_layers": [1], "num_experts_per_tok": 5}),
    ("gemma", "1", {}),
    ("gemma", "1-multi-query-wide", {"num_key_value_heads": 1, "head_dim": 20}),
    ("gemma2", "soft-caps", {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 0.5}),
    (
        "gemma2",
        "no-soft-caps",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": LAYERS},
    ),
    ("gemma3", "local-and-global", {"layer_types": LAYERS}),
    (
        "gemma3",
        "ropes",
        {
            "layer_types": LAYERS,
            "final_logit_softcapping": 0.8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
]
SHARE = 1e-5  # of the logits' spread: what two orders of summing float32 come to
LENGTHS = {"a": 1, "b": 2, "c": 5, "d": 16, "e": 33, "f": 70}


def prompts(vocab: int, seed: int = 0) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {name: [draw.randrange(3, vocab) for _ in range(count)] for name, count in LENGTHS.items()}


def run(
    folder: Path,
    steps: int = 14,
    break_it: Callable[[harness.PagedRun], None] | None = None,
    ops: dict[str, str] | None = None,
) -> float:
    """The largest difference of any logit from Transformers', as a share of the logits' spread; asserts that greedy
    outputs vary."""
    config = harness.config_for(folder)
    arch = config.model.arch
    paged = harness.PagedRun(load_model(config, CPU, Binder(CPU, torch.float32, ops)), arch, block=4)
    judge = harness.Judge(folder)
    sequences = prompts(arch.vocab_size)
    got: dict[str, list[torch.Tensor]] = {name: [] for name in sequences}

    def step(rows: list[tuple[str, list[int]]], padding: int = 0) -> None:
        for name, logits in paged.step(rows, padding).items():
            got[name].append(logits)

    step([("a", sequences["a"]), ("c", sequences["c"]), ("d", sequences["d"][:7]), ("f", sequences["f"][:40])])
    step([("d", sequences["d"][7:]), ("b", sequences["b"]), ("f", sequences["f"][40:])], padding=1)
    if break_it is not None:
        break_it(paged)
    for i in range(steps):
        running = [name for name in sequences if got[name] and name != "e"] + (["e"] if i > 2 else [])
        rows = []
        for name in running:
            sequences[name].append(int(got[name][-1][-1].argmax()))
            rows.append((name, sequences[name][-1:]))
        if i == 2:
            rows.append(("e", sequences["e"]))
        step(rows, padding=i % 3)
    drawn = {token for name in sequences for token in sequences[name][LENGTHS[name] :]}
    assert len(drawn) >= 10, f"greedy decoding repeats itself: {drawn}"
    worst = 0.0
    for name, tokens in sequences.items():
        logits = torch.cat(got[name])
        assert len(logits) == len(tokens)
        expected = judge.logits(tokens)
        worst = max(worst, float((logits - expected).abs().max() / (expected.max() - expected.min())))
    return worst


@pytest.mark.parametrize("ops", [None, {"*": "reference"}], ids=["best-ops", "reference-ops"])
@pytest.mark.parametrize(("arch", "overrides"), [pytest.param(a, o, id=f"{a}-{n}") for a, n, o in CASES])
def test_logits_equal_transformers(
    checkpoint: Callable[..., Path], arch: str, overrides: dict[str, Any], ops: dict[str, str] | None
) -> None:
    assert run(checkpoint(arch, **overrides), ops=ops) < SHARE


def test_dynamic_rope_beyond_its_length_equals_a_cached_decode(checkpoint: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = checkpoint("llama", max_position_embeddings=24, rope_parameters=rope)
    config = harness.config_for(folder)
    assert config.model.max_model_len == 96
    paged = harness.PagedRun(load_model(config, torch.device("cpu")), config.model.arch)
    judge = harness.Judge(folder).model
    tokens = prompts(config.model.arch.vocab_size)["f"]
    with torch.no_grad():
        expected = judge(torch.tensor([tokens[:20]]), use_cache=True)
        got = paged.step([("f", tokens[:20])])["f"]
        for token in tokens[20:]:
            assert torch.allclose(got, expected.logits[0], atol=harness.TOLERANCE)
            expected = judge(torch.tensor([[token]]), past_key_values=expected.past_key_values, use_cache=True)
            got = paged.step([("f", [token])])["f"]


def swap_two_blocks(paged: harness.PagedRun) -> None:
    """Of two sequences; within one, the order of full blocks means nothing to attention, since keys are rotated."""
    for ours, theirs in zip(paged.tables["f"], paged.tables["d"], strict=True):
        ours[1], theirs[1] = theirs[1], ours[1]


def drop_the_window(paged: harness.PagedRun) -> None:
    for module in paged.model.modules():
        if hasattr(module, "window"):
            module.window = None


def shift_positions(paged: harness.PagedRun) -> None:
    """From here on every new token claims to stand one further than it does."""
    paged.shift = 1


@pytest.mark.parametrize(
    ("arch", "break_it"),
    [("llama", swap_two_blocks), ("mistral", drop_the_window), ("llama", shift_positions), ("gpt2", shift_positions)],
)
def test_the_check_fails_when_something_is_wrong(checkpoint: Callable[..., Path], arch: str, break_it: Any) -> None:
    overrides = {"sliding_window": 12} if arch == "mistral" else {}
    assert run(checkpoint(arch, **overrides), break_it=break_it) > 100 * harness.TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "qwen3", "opt", "gpt2"])
def test_a_decode_step_asks_the_device_for_nothing(checkpoint: Callable[..., Path], arch: str) -> None:
    """On tensors without values any host sync is an error, so what passes can be captured in a graph."""
    config = harness.config_for(checkpoint(arch))
    model = load_model(config, CPU, Binder(CPU, torch.float32, {"*": "reference"}))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = torch.zeros(3, dtype=torch.int64)
        group = GroupMeta(torch.zeros(3, 2, dtype=torch.int32), rows)
        meta = AttentionMeta(torch.arange(4), rows.int(), None, 1, 8, 3, (group,))
        shape = (2, 9, 4, config.model.arch.num_kv_heads, config.model.arch.head_dim)
        kv = [(0, torch.zeros(shape)) for _ in range(config.model.arch.num_layers)]
        hidden = model(rows, rows, Step(rows, meta, kv))
        assert model.compute_logits(hidden).shape == (3, config.model.arch.vocab_size)
