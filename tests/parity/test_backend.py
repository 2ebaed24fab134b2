"""Models from their own Transformers code, through the whole engine: each equals Transformers, or is refused at load
with the reason that docs/models.md gives; code that comes with a checkpoint; and that these checks can fail."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backend_cases
import parity_harness as harness
import pytest
import test_engine as engines
import torch
import transformers
from backend_cases import CASES, Case
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

from quire import LLM, SamplingParams
from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.layers.groups import kv_groups
from quire.layers.linear import Linear, LMHead, MergedLinear
from quire.layers.mlp import MLP
from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.loading import load_model
from quire.loading.mapped import mapped_bytes
from quire.models import choice
from quire.models.transformers import describe, proof
from quire.models.transformers import likeness as likeness_of
from quire.models.transformers import model as backend_model
from quire.models.transformers.fused import replace_gated
from quire.models.transformers.hook import PagedAttention
from quire.models.transformers.leaves import OwnEmbedding, OwnRMSNorm
from quire.ops.dispatch import Binder
from quire.types.errors import ClientError

CPU = torch.device("cpu")
DATA = Path(__file__).parent.parent / "data"
WORKING = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """As the harness does it, whatever a norm's weights are added to and however experts are laid out."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            scale = 0.3 if name.endswith("weight") and bool((parameter == parameter[0]).all()) else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
        elif parameter is table:
            parameter.normal_(0, 0.5 if tied else 1.0)
        else:
            conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) or parameter.dim() > 2
            parameter.normal_(0, 1.5 / parameter.shape[0 if conv and parameter.dim() == 2 else -1] ** 0.5)


def make(root: Path, case: Case) -> Path:
    folder = root / case.architecture
    if not folder.exists():
        kind = getattr(transformers, case.architecture)
        torch.manual_seed(len(case.architecture))
        model = kind(kind.config_class(**case.settings))
        liven(model)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`backend(architecture) -> folder`, each made once a session."""
    root = tmp_path_factory.mktemp("backend")
    cases = {case.architecture: case for case in CASES}
    return lambda architecture: make(root, cases[architecture])


def config_for(folder: Path, **changes: Any) -> Any:
    return resolve(EngineArgs(model=str(folder), **{"dtype": "float32", "skip_tokenizer_init": True, **changes}))


def engine(folder: Path, **changes: Any) -> Any:
    """The engine of the native tests, its pool as tight, from Transformers' code."""
    options = {"model_impl": "transformers", **changes}
    known = {key: options[key] for key in ("trust_remote_code", "model_impl") if key in options}
    arch = config_for(folder, max_model_len=engines.MAX_LEN, **known).model.arch
    groups = kv_groups(arch, engines.MAX_LEN)
    longest = sum(engines.MAX_LEN if group.window is None else group.window + 24 for group in groups)
    options.setdefault("num_gpu_blocks_override", longest // engines.BLOCK + 3 * len(groups))
    return engines.engine_of(folder, **options)


@pytest.mark.parametrize("case", WORKING, ids=lambda case: case.architecture)
def test_engine_equals_transformers(backend: Callable[[str], Path], case: Case) -> None:
    folder = backend(case.architecture)
    judge = harness.Judge(folder)
    prompts, params = engines.batch(199)
    with engine(folder) as llm:
        outputs = engines.run(llm, prompts, params)
        stats = llm.llm_engine.stat_logger.stats
        assert stats.preemptions > 0, "the pool was not small enough"
        assert stats.prefix_hits > 0, "nothing was shared"
        assert stats.blocks_used == 0, "blocks leaked"
    greedy = [tokens for output in outputs[:-2] for tokens in output.outputs[0].token_ids]
    assert len(set(greedy)) >= 10, "greedy decoding repeats itself"
    engines.check(judge, outputs, params)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.architecture)
def test_what_cannot_work_is_refused_at_load(backend: Callable[[str], Path], case: Case) -> None:
    folder = backend(case.architecture)
    with pytest.raises(ClientError) as refusal:
        load_model(config_for(folder, model_impl="transformers"), CPU)
    assert case.refused is not None and case.refused in str(refusal.value)


def test_the_table_in_the_documentation_is_what_these_tests_show() -> None:
    page = PAGE.read_text(encoding="utf-8")
    written = backend_cases.into(page)
    if written != page:
        PAGE.write_text(written, encoding="utf-8")
    assert written == page, "docs/models.md was out of date and has been written again"
    assert len(WORKING) >= 25


Forward = Callable[..., Tensor]


def swap_two_blocks(forward: Forward, self: PagedAttention, q: Any, k: Any, v: Any, at: Tensor, step: Step) -> Tensor:
    """The first two rows read each other's second page."""
    groups = []
    for group in step.attn.groups:
        tables = group.block_tables_RP.clone()
        if tables.shape[0] > 1 and tables.shape[1] > 1:
            tables[:2, 1] = tables[:2, 1].flip(0)
        groups.append(dataclasses.replace(group, block_tables_RP=tables))
    meta = dataclasses.replace(step.attn, groups=tuple(groups))
    return forward(self, q, k, v, at, dataclasses.replace(step, attn=meta))


def drop_the_window(forward: Forward, self: PagedAttention, *rest: Any) -> Tensor:
    self.window = None
    return forward(self, *rest)


def forget_the_cap(forward: Forward, self: PagedAttention, *rest: Any) -> Tensor:
    self.softcap = None
    return forward(self, *rest)


@pytest.mark.parametrize(
    ("architecture", "break_it"),
    [
        ("GPTNeoXForCausalLM", swap_two_blocks),
        ("Starcoder2ForCausalLM", drop_the_window),
        ("Gemma2ForCausalLM", forget_the_cap),
    ],
)
def test_the_check_fails_when_something_is_wrong(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, architecture: str, break_it: Callable[..., Tensor]
) -> None:
    folder = backend(architecture)
    monkeypatch.setattr(backend_model, "replace_attention", lambda *args: False)
    prompts, params = engines.batch(199)
    with engine(folder, num_gpu_blocks_override=800, enable_prefix_caching=False, enforce_eager=True) as llm:
        attend = PagedAttention.attend
        monkeypatch.setattr(PagedAttention, "attend", lambda self, *rest: break_it(attend, self, *rest))
        outputs = engines.run(llm, prompts, params)
    with pytest.raises(AssertionError):
        engines.check(harness.Judge(folder), outputs, params)


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True},
        {"enable_prefix_caching": False, "block_size": 16, "num_gpu_blocks_override": 12},
        {"swap_space": 0.01},
        {"ops": {"*": "reference"}},
        {"enforce_eager": True},
    ],
    ids=["overlapped", "no-prefix-cache", "swapping", "reference-ops", "eager"],
)
def test_every_setting_gives_the_same(backend: Callable[[str], Path], changes: dict[str, Any]) -> None:
    folder = backend("GraniteForCausalLM")
    prompts, params = engines.batch(199)
    with engine(folder, **changes) as llm:
        engines.check(harness.Judge(folder), engines.run(llm, prompts, params), params)


@pytest.mark.parametrize("pages_only", [False, True], ids=["its-layers", "its-attention"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "HeliumForCausalLM"]
)
def test_what_runs_as_llama_also_runs_from_its_own_code(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, architecture: str, pages_only: bool
) -> None:
    folder = backend(architecture)
    assert load_model(config_for(folder, model_impl="transformers"), CPU).native is not None
    monkeypatch.setattr(backend_model, "likeness", lambda *args: None)
    if pages_only:
        monkeypatch.setattr(backend_model, "replace_attention", lambda *args: False)
    assert load_model(config_for(folder, model_impl="transformers"), CPU).fused != pages_only
    prompts, params = engines.batch(199)
    with engine(folder) as llm:
        engines.check(harness.Judge(folder), engines.run(llm, prompts, params), params)


def scaled_residual(model: Any) -> None:
    layer = type(model.layers[1])
    model.layers[1].forward = lambda x, **rest: layer.forward(model.layers[1], x, **rest) * 1.001


def clipped_values(model: Any) -> None:
    attention = model.layers[2].self_attn
    attention.v_proj.register_forward_hook(lambda module, inputs, out: out.clamp(-8, 8))


def late_positions(model: Any) -> None:
    """As models do that scale what is far from the beginning."""
    attention = model.layers[0].self_attn

    def forward(*args: Any, **kwargs: Any) -> Any:
        out, weights = type(attention).forward(attention, *args, **kwargs)
        return out * (1 + 0.1 * (kwargs["position_ids"] > 400).float().unsqueeze(-1)), weights

    attention.forward = forward


@pytest.mark.parametrize("change", [scaled_residual, clipped_values, late_positions])
def test_a_model_that_is_nearly_a_llama_is_found_out(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    folder = backend("LlamaForCausalLM")
    miniature = likeness_of.miniature

    def changed(whole: Any) -> Any:
        small = miniature(whole)
        change(small.model)
        return small

    monkeypatch.setattr(likeness_of, "miniature", changed)
    assert load_model(config_for(folder, model_impl="transformers"), CPU).native is None


def test_a_clip_keeps_attention_the_model_s_own(backend: Callable[[str], Path]) -> None:
    """OLMo clips q, k and v; StarCoder2 does not."""
    olmo, starcoder = backend("OlmoForCausalLM"), backend("Starcoder2ForCausalLM")
    assert not load_model(config_for(olmo, model_impl="transformers"), CPU).fused
    assert load_model(config_for(starcoder, model_impl="transformers"), CPU).fused


def test_sums_of_a_model_s_own_code_are_recorded(
    backend: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "quire.runner"), engine(backend("StableLmForCausalLM")) as llm:
        assert tokens_of(llm)
    assert "operation by operation" not in caplog.text


def test_a_gap_in_the_names_or_a_factor_makes_no_llama(backend: Callable[[str], Path]) -> None:
    for architecture in ("GraniteForCausalLM", "Olmo2ForCausalLM", "Ministral3ForCausalLM"):
        assert load_model(config_for(backend(architecture), model_impl="transformers"), CPU).native is None


def test_it_is_taken_where_no_native_class_exists(backend: Callable[[str], Path]) -> None:
    helium, llama = backend("HeliumForCausalLM"), backend("LlamaForCausalLM")
    assert config_for(helium).model.model_impl == "transformers"
    assert config_for(llama).model.model_impl == "quire"
    assert config_for(llama, model_impl="transformers").model.model_impl == "transformers"
    with pytest.raises(ClientError, match="Helium"):
        load_model(config_for(helium, model_impl="quire"), CPU)


def test_without_transformers_the_error_says_what_to_install(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*name: Any) -> Any:
        raise ImportError("No module named 'transformers'")

    folder = backend("HeliumForCausalLM")
    monkeypatch.setattr(choice, "import_module", absent)
    with pytest.raises(ClientError, match=r"pip install 'quire\[transformers\]'"):
        config_for(folder)


def tokens_of(llm: LLM, count: int = 12, **params: Any) -> list[list[int]]:
    prompts: Any = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (5, 30, 61)]
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, **params)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def test_two_models_in_one_process_do_not_mix_their_steps(backend: Callable[[str], Path]) -> None:
    folders = backend("GraniteForCausalLM"), backend("Starcoder2ForCausalLM")
    alone = []
    for folder in folders:
        with engine(folder) as llm:
            alone.append(tokens_of(llm))
    with engine(folders[0]) as first, engine(folders[1]) as second:
        for _ in range(2):
            assert [tokens_of(first), tokens_of(second)] == alone


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("own_code", [False, True], ids=["as-llama", "own-code"])
def test_quantization_applies_as_to_native_models(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, scheme: str, own_code: bool
) -> None:
    folder = checkpoint("llama", hidden_size=64, intermediate_size=96)
    answers = []
    if own_code:
        monkeypatch.setattr(backend_model, "likeness", lambda *args: None)
    for impl in ("quire", "transformers"):
        with engines.engine_of(folder, num_gpu_blocks_override=200, quantization=scheme, model_impl=impl) as llm:
            answers.append(tokens_of(llm))
    assert answers[0] == answers[1]
    model = load_model(config_for(folder, quantization=scheme, model_impl="transformers"), CPU)
    layers = [module for module in model.modules() if isinstance(module, Linear | MergedLinear | LMHead)]
    assert len(layers) > 9 and not any(isinstance(layer.weight, Tensor) for layer in layers)


def test_weights_are_the_file_s_own_bytes(backend: Callable[[str], Path]) -> None:
    folder = backend("PersimmonForCausalLM")
    model = load_model(config_for(folder, model_impl="transformers"), CPU)
    assert mapped_bytes(model) >= 0.9 * (folder / "model.safetensors").stat().st_size


def test_leaves_are_quire_s_and_know_how_to_be_cut(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_model, "replace_attention", lambda *args: False)
    model = load_model(config_for(backend("GraniteForCausalLM"), model_impl="transformers", load_format="dummy"), CPU)
    layer = model.get_submodule("model.layers.1")
    assert layer.get_submodule("self_attn.q_proj").split == "columns"
    assert layer.get_submodule("self_attn.o_proj").split == "rows"
    assert isinstance(layer.get_submodule("input_layernorm"), OwnRMSNorm)
    assert isinstance(model.get_submodule("model.embed_tokens"), OwnEmbedding)


def test_an_expert_checkpoint_of_one_tensor_each_is_put_together(backend: Callable[[str], Path]) -> None:
    """The files hold a matrix for each expert, the code one for all."""
    folder = backend("MixtralForCausalLM")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    model = load_model(config_for(folder, model_impl="transformers"), CPU)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    mine = dict(model.named_parameters())
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        assert torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "HeliumForCausalLM", "GPT2LMHeadModel"])
def test_a_decode_step_asks_the_device_for_nothing(
    backend: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """On tensors without values any host sync is an error, so what passes can be captured in a graph."""
    monkeypatch.setattr(backend_model, "likeness", lambda *args: None)
    monkeypatch.setattr(backend_model, "replace_attention", lambda *args: False)
    config = config_for(backend(architecture), model_impl="transformers")
    model = load_model(config, CPU, Binder(CPU, torch.float32, {"*": "reference"}))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = torch.zeros(3, dtype=torch.int64)
        group = GroupMeta(torch.zeros(3, 2, dtype=torch.int32), rows)
        meta = AttentionMeta(torch.arange(4), rows.int(), None, 1, 8, 3, (group,))
        shape = (2, 9, 4, config.model.arch.num_kv_heads, config.model.arch.head_dim)
        kv = [(0, torch.zeros(shape)) for _ in range(config.model.arch.num_layers)]
        hidden = model(rows, rows, Step(rows, meta, kv))
        assert model.compute_logits(hidden).shape == (3, config.model.arch.vocab_size)


def test_rope_scaling_by_the_batch_is_refused_beyond_the_length_it_starts_at(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4, **factors}
    case = Case("Phi3ForCausalLM", {"rope_parameters": rope, "original_max_position_embeddings": 64})
    folder = make(tmp_path, case)
    with pytest.raises(ClientError, match="max_model_len to at most 64"):
        load_model(config_for(folder, model_impl="transformers", max_model_len=65), CPU)
    judge = harness.Judge(folder)
    with engines.engine_of(folder, model_impl="transformers", max_model_len=64, num_gpu_blocks_override=60) as llm:
        prompt = list(range(3, 43))
        params = SamplingParams(temperature=0.0, max_tokens=15, detokenize=False, ignore_eos=True)
        output = llm.generate({"prompt_token_ids": prompt}, params)[0]
    harness.assert_greedy_matches(judge, [prompt], [list(output.outputs[0].token_ids)])


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose model only its author has: parallel attention and a gate that Transformers knows nothing of.
    Its layers take no keyword arguments, so nothing could be passed through them."""
    folder = tmp_path_factory.mktemp("own") / "twig"
    shutil.copytree(DATA / "twig", folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    liven(model)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_in_a_checkpoint_is_refused_unless_it_is_trusted(own_code: Path) -> None:
    for impl in ("auto", "transformers"):
        for runner in ("generate", "pooling"):
            with pytest.raises(ClientError, match="trust_remote_code=True") as caught:
                LLM(model=str(own_code), model_impl=impl, runner=runner, skip_tokenizer_init=True)
            assert caught.value.parameter == "trust_remote_code" and "quire pools" not in str(caught.value)


def test_code_in_a_checkpoint_runs_when_it_is_trusted(own_code: Path) -> None:
    judge = harness.Judge(own_code, trust_remote_code=True)
    prompts, params = engines.batch(199)
    with engine(own_code, model_impl="auto", trust_remote_code=True) as llm:
        outputs = engines.run(llm, prompts, params)
        assert llm.llm_engine.stat_logger.stats.preemptions > 0
    engines.check(judge, outputs, params)


def test_trusted_code_reaches_an_engine_in_another_process(own_code: Path) -> None:
    """The engine's process has never seen the class."""
    script = (
        "import asyncio\n"
        "from quire import AsyncLLM, SamplingParams\n"
        "from quire.config.args import EngineArgs\n"
        "async def main():\n"
        f"    args = EngineArgs(model={str(own_code)!r}, trust_remote_code=True, skip_tokenizer_init=True,\n"
        "        dtype='float32', max_model_len=64, kv_cache_memory_bytes='4M')\n"
        "    llm = AsyncLLM.from_engine_args(args)\n"
        "    params = SamplingParams(max_tokens=4, temperature=0.0, detokenize=False)\n"
        "    async for out in llm.generate({'prompt_token_ids': [5, 6, 7]}, params, request_id='1'):\n"
        "        last = out\n"
        "    print('got', len(last.outputs[0].token_ids))\n"
        "    llm.shutdown()\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "got 4" in done.stdout, done.stderr


def clipped(block: Any) -> None:
    forward = block.forward
    block.forward = lambda x: forward(x).clamp(-1e4, 1e4)


def another_factor(block: Any) -> None:
    forward = block.forward
    block.forward = lambda x: forward(x) * 1.001


@pytest.mark.parametrize("change", [None, clipped, another_factor])
def test_a_gated_block_is_known_by_what_it_computes(change: Callable[[Any], None] | None) -> None:
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, hidden_act="gelu_pytorch_tanh"
    )
    body = nn.Module()
    body.block = modeling_llama.LlamaMLP(config)
    if change is not None:
        change(body.block)
    replace_gated(body)
    assert isinstance(body.block, MLP) == (change is None)
    if change is None:
        assert body.block.kind in ("gelu_new", "gelu_pytorch_tanh")


def test_numbers_that_are_none_are_no_match() -> None:
    good, bad = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    assert proof.differ(good, bad) > max(backend_model.TOLERANCE.values())
    assert proof.differ(good, good) == proof.differ(bad, bad) == 0.0


@pytest.mark.parametrize("pools", [False, True])
def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, pools: bool) -> None:
    monkeypatch.setattr(describe.transformers, "__version__", "5.16.3")
    name, kind = ("BertModel", "bert") if pools else ("HeliumForCausalLM", "helium")
    raw = {"architectures": [name], "model_type": kind}
    with pytest.raises(ClientError, match=r"5\.16\.3 is too old .*'transformers>=5\.17'"):
        choice.choose(raw, DATA, "auto", False, pools)
