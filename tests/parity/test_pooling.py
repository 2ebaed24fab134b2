"""Models that pool against Transformers with the same weights: embeddings, classes, tokens' vectors and scores, with
chunking, preemption and prefix hits forced. sentence-transformers' arithmetic is written out here."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parity_harness as harness
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from quire import LLM, ClientError, PoolingParams
from quire.config import PoolerConfig
from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.layers.attention import Attention
from quire.layers.step import Step

TOLERANCE = 1e-4
MAX_LEN, BLOCK = 128, 4
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 128, 4, 17)
CLASSES = {"num_labels": 3, "pad_token_id": 0}


@contextmanager
def engine(folder: Path, **changes: Any) -> Iterator[LLM]:
    """Room for one longest sequence and little more in each group, and steps shorter than most prompts."""
    groups = harness.kv_groups(harness.config_for(folder).model.arch, MAX_LEN)
    longest = sum(MAX_LEN if group.window is None else group.window + 24 for group in groups)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "block_size": BLOCK,
        "num_gpu_blocks_override": longest // BLOCK + 3 * len(groups),
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    with LLM(model=str(folder), **{**settings, **changes}) as llm:
        yield llm
        assert llm.llm_engine.stat_logger.stats.blocks_used == 0, "blocks leaked"
        llm.llm_engine.client.check()  # type: ignore[attr-defined]


def prompts_of(vocab: int = 199) -> list[list[int]]:
    """Of all lengths, four of them with one long beginning."""
    draw = random.Random(7)
    prompts = [[draw.randrange(3, vocab) for _ in range(count)] for count in LENGTHS]
    shared = [draw.randrange(3, vocab) for _ in range(30)]
    return [*prompts, *([*shared, *[draw.randrange(3, vocab) for _ in range(count)]] for count in (0, 1, 6, 11))]


def inputs_of(prompts: Sequence[Sequence[int]]) -> Any:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def cramped(llm: LLM, prompts: list[list[int]], task: str, params: Any = None) -> list[Tensor]:
    """The vectors of all prompts, half of them late and with higher priority. The planner itself never begins two
    prompts that it cannot end, so now and then the last one in line is preempted by force, in the middle of a plan."""
    core = llm.llm_engine
    planner = core.client._scheduler._planner  # type: ignore[attr-defined]
    make, lots = planner._draft, random.Random(3)

    def draft(moves: Any) -> Any:
        if planner._state.running and planner._state.counters.preemptions < 12 and lots.random() < 0.3:
            planner._state.order()
            if planner._state.running:
                planner._state.preempt(planner._state.running[-1], moves)
        return make(moves)

    planner._draft = draft
    params = params or PoolingParams(task=task)
    drafts = core.inputs.drafts(inputs_of(prompts), [params] * len(prompts))
    late = {len(prompts) // 2 + i: 2 * i for i in range(len(prompts) - len(prompts) // 2)}
    found: dict[str, Tensor] = {}
    for i, draft in enumerate(drafts):
        if i not in late:
            core.add(draft, str(i), priority=5)
    step = 0
    while core.has_work or late:
        for i in [i for i, when in late.items() if when <= step]:
            del late[i]
            core.add(drafts[i], str(i), priority=-i)
        for output in core.step():
            assert output.finished
            found[output.request_id] = torch.tensor(output.outputs.data)  # type: ignore[union-attr]
        step += 1
    planner._draft = make
    return [found[str(i)] for i in range(len(prompts))]


@torch.no_grad()
def enliven(model: nn.Module, size: float = 2.0) -> None:
    """Random weights of such size that each layer matters."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norm = name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3 if norm else 0.1)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.normal_(0, 1.0)
        else:
            fan_in = parameter.shape[0] if ".c_" in name else parameter.shape[1]
            parameter.normal_(0, size / fan_in**0.5)


def make(root: Path, name: str, base: str, **settings: Any) -> Path:
    """A checkpoint of the class `name` of Transformers, with the sizes that the harness gives `base`."""
    folder = root / f"{name}-{len(list(root.iterdir())) if root.exists() else 0}"
    cls = getattr(transformers, name)
    torch.manual_seed(5)
    sizes = dict(harness._BASES[base][1])  # type: ignore[attr-defined]
    model = cls(cls.config_class(**{**sizes, **settings}))
    enliven(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def hidden_states(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([list(prompt)])).last_hidden_state[0] for prompt in prompts]


def pooled(hidden_LD: Tensor, mode: str) -> Tensor:
    modes = {"LAST": hidden_LD[-1], "CLS": hidden_LD[0], "MEAN": hidden_LD.mean(0), "MAX": hidden_LD.amax(0)}
    return modes[mode]


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().max()))
        assert float((mine - theirs).abs().max()) <= TOLERANCE * scale
        cosine = F.cosine_similarity(mine.reshape(1, -1), theirs.reshape(1, -1))
        assert float(cosine) >= 1 - TOLERANCE


WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4, "max_window_layers": 2}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 10}),
    ("qwen2", WINDOWS),
    ("qwen3", {}),
    ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    ("gpt2", {}),
    ("falcon", {}),
    ("mpt", {}),
    ("phi3", {}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3", {}),
]


@pytest.mark.parametrize("mode", ["LAST", "MEAN", "CLS", "MAX"])
@pytest.mark.parametrize(("arch", "overrides"), BODIES, ids=[arch for arch, _ in BODIES])
def test_embeddings(checkpoint: Callable[..., Path], arch: str, overrides: dict[str, Any], mode: str) -> None:
    folder, prompts = checkpoint(arch, **overrides), prompts_of()
    expected = [F.normalize(pooled(h, mode), dim=-1) for h in hidden_states(folder, prompts)]
    changes = {"scheduling_policy": "priority", "pooler_config": {"pooling_type": mode}}
    with engine(folder, runner="pooling", **changes) as llm:
        check(cramped(llm, prompts, "embed"), expected)
        stats = llm.llm_engine.stat_logger.stats
        assert stats.preemptions > 0
        hits = stats.prefix_hits
        assert hits > 0 if mode == "LAST" else hits == 0, "only the last position alone can do without the others"
        again = llm.embed(inputs_of(prompts), use_tqdm=False)
        assert [output.prompt_token_ids for output in again] == prompts
        check([torch.tensor(output.outputs.embedding) for output in again], expected)


@pytest.mark.parametrize(("arch", "overrides"), BODIES, ids=[arch for arch, _ in BODIES])
def test_vectors_of_each_token(checkpoint: Callable[..., Path], arch: str, overrides: dict[str, Any]) -> None:
    folder, prompts = checkpoint(arch, **overrides), prompts_of()
    with engine(folder, runner="pooling", scheduling_policy="priority") as llm:
        raw = PoolingParams(task="token_embed", use_activation=False)
        expected = hidden_states(folder, prompts)
        check(cramped(llm, prompts, "token_embed", raw), expected)
        assert llm.llm_engine.stat_logger.stats.preemptions > 0
        found = llm.encode(inputs_of(prompts), pooling_task="token_embed", use_tqdm=False)
        check([output.outputs.data for output in found], [F.normalize(h, dim=-1) for h in expected])


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True},
        {"enable_prefix_caching": False, "block_size": 16, "num_gpu_blocks_override": 12},
        {"max_num_batched_tokens": 512, "max_num_seqs": 32, "num_gpu_blocks_override": 900},
        {"swap_space": 0.01},
        {"max_num_seqs": 2, "max_num_batched_tokens": 3},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
        {"ops": {"*": "reference"}},
    ],
    ids=["overlapped", "no-prefix-cache", "roomy", "swapping", "cramped", "whole-prompts", "reference-ops"],
)
@pytest.mark.parametrize("mode", ["LAST", "MEAN"])
def test_every_setting_gives_the_same(checkpoint: Callable[..., Path], changes: dict[str, Any], mode: str) -> None:
    folder, prompts = checkpoint("llama"), prompts_of()
    expected = [F.normalize(pooled(h, mode), dim=-1) for h in hidden_states(folder, prompts)]
    more = {"scheduling_policy": "priority", "pooler_config": {"pooling_type": mode}}
    with engine(folder, runner="pooling", **{**more, **changes}) as llm:
        check(cramped(llm, prompts, "embed"), expected)


def swap_two_blocks(forward: Any, self: Attention, q: Tensor, k: Tensor, v: Tensor, at: Tensor, step: Step) -> Tensor:
    """The first two rows read each other's second page."""
    groups = []
    for group in step.attn.groups:
        tables = group.block_tables_RP.clone()
        if tables.shape[0] > 1 and tables.shape[1] > 1:
            tables[:2, 1] = tables[:2, 1].flip(0)
        groups.append(dataclasses.replace(group, block_tables_RP=tables))
    meta = dataclasses.replace(step.attn, groups=tuple(groups))
    return forward(self, q, k, v, at, dataclasses.replace(step, attn=meta))


def test_the_check_fails_when_something_is_wrong(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts = checkpoint("llama"), prompts_of()
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *rest: swap_two_blocks(forward, self, *rest))
    with engine(folder, runner="pooling", num_gpu_blocks_override=400, enable_prefix_caching=False) as llm:
        found = cramped(llm, prompts, "embed")
    with pytest.raises(AssertionError):
        check(found, [F.normalize(h[-1], dim=-1) for h in hidden_states(folder, prompts)])


def test_a_bare_body(tmp_path: Path) -> None:
    """A checkpoint of the body alone says by its architecture that it embeds."""
    folder, prompts = make(tmp_path, "Qwen3Model", "qwen3", head_dim=16), prompts_of()
    with engine(folder) as llm:
        check(cramped(llm, prompts, "embed"), [F.normalize(h[-1], dim=-1) for h in hidden_states(folder, prompts)])


CLASSIFIERS = [("Llama", "llama"), ("Mistral", "mistral"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("GPT2", "gpt2")]


@torch.no_grad()
def logits(folder: Path, kind: str, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([list(prompt)])).logits[0] for prompt in prompts]


@pytest.mark.parametrize(("family", "base"), CLASSIFIERS, ids=[base for _, base in CLASSIFIERS])
def test_classes(tmp_path: Path, family: str, base: str) -> None:
    folder, prompts = make(tmp_path, f"{family}ForSequenceClassification", base, **CLASSES), prompts_of()
    expected = logits(folder, "SequenceClassification", prompts)
    with engine(folder, scheduling_policy="priority") as llm:
        raw = PoolingParams(task="classify", use_activation=False)
        check(cramped(llm, prompts, "classify", raw), expected)
        stats = llm.llm_engine.stat_logger.stats
        assert stats.preemptions > 0 and stats.prefix_hits > 0
        found = llm.classify(inputs_of(prompts), use_tqdm=False)
        check([torch.tensor(o.outputs.probs) for o in found], [x.softmax(-1) for x in expected])
        assert found[0].outputs.num_classes == 3
        each = llm.encode(inputs_of(prompts), pooling_task="token_classify", use_tqdm=False)
        assert [tuple(o.outputs.data.shape) for o in each] == [(len(prompt), 3) for prompt in prompts]
        check([o.outputs.data[-1] for o in each], [x.softmax(-1) for x in expected])


@pytest.mark.parametrize(("family", "base"), [("Llama", "llama"), ("Qwen2", "qwen2"), ("GPT2", "gpt2")])
def test_classes_of_each_token(tmp_path: Path, family: str, base: str) -> None:
    folder, prompts = make(tmp_path, f"{family}ForTokenClassification", base, **CLASSES), prompts_of()
    expected = [x.softmax(-1) for x in logits(folder, "TokenClassification", prompts)]
    with engine(folder, scheduling_policy="priority") as llm:
        check(cramped(llm, prompts, "token_classify"), expected)
        with pytest.raises(ClientError, match="token_classify, not 'classify'"):
            llm.classify(inputs_of(prompts))


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, lambda x: x.softmax(-1)),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, None),
        ({"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, torch.tanh),
    ],
)
def test_activations(tmp_path: Path, settings: dict[str, Any], function: Any) -> None:
    folder = make(tmp_path, "LlamaForSequenceClassification", "llama", **settings)
    prompts = prompts_of()[:6]
    expected = logits(folder, "SequenceClassification", prompts)
    with engine(folder) as llm:
        found = llm.classify(inputs_of(prompts), use_tqdm=False)
        check([torch.tensor(o.outputs.probs) for o in found], [function(x) if function else x for x in expected])
    with engine(folder, pooler_config={"logit_mean": 0.5, "logit_sigma": 2.0, "use_activation": False}) as llm:
        found = llm.classify(inputs_of(prompts), use_tqdm=False)
        check([torch.tensor(o.outputs.probs) for o in found], [(x - 0.5) / 2 for x in expected])


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**raw, **changes}))


def test_a_reward_model_with_a_deep_head(tmp_path: Path) -> None:
    folder, prompts = make(tmp_path, "Qwen2Model", "qwen2"), prompts_of()
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1))
    save_file({f"score.{name}": tensor for name, tensor in head.state_dict().items()}, folder / "more.safetensors")
    (folder / "model.safetensors").rename(folder / "body.safetensors")
    hidden = hidden_states_from(folder, "body.safetensors", prompts)
    rewrite(folder, "config.json", architectures=["Qwen2ForRewardModel"])
    with torch.no_grad(), engine(folder, scheduling_policy="priority") as llm:
        check(cramped(llm, prompts, "token_classify"), [head(h) for h in hidden])


def hidden_states_from(folder: Path, file: str, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    from safetensors.torch import load_file

    with torch.no_grad():
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
        model.load_state_dict(load_file(folder / file))
        return [model(torch.tensor([list(prompt)])).last_hidden_state[0] for prompt in prompts]


@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_files(checkpoint: Callable[..., Path], tmp_path: Path, normalize: bool) -> None:
    """Mean pooling, a dense layer with tanh, perhaps normalisation, and a shorter length, from the folder alone."""
    folder, prompts = tmp_path / "model", [prompt for prompt in prompts_of() if len(prompt) <= 64]
    folder.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (folder / file.name).symlink_to(file)
    kinds = ["Transformer", "Pooling", "Dense", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    rewrite(folder, "1_Pooling/config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    rewrite(folder, "2_Dense/config.json", in_features=48, out_features=20, bias=True)
    rewrite(folder, "sentence_bert_config.json", max_seq_length=64)
    torch.manual_seed(3)
    dense = nn.Linear(48, 20)
    save_file({f"linear.{k}": v for k, v in dense.state_dict().items()}, folder / "2_Dense/model.safetensors")
    with torch.no_grad():
        expected = [torch.tanh(dense(h.mean(0))) for h in hidden_states(folder, prompts)]
    expected = [F.normalize(x, dim=-1) if normalize else x for x in expected]
    changes = {"max_model_len": None, "num_gpu_blocks_override": 20, "scheduling_policy": "priority"}
    with engine(folder, **changes) as llm:
        assert llm.llm_engine.config.model.max_model_len == 64
        check(cramped(llm, prompts, "embed"), expected)
        with pytest.raises(ClientError, match="65 tokens, which are more than max_model_len=64"):
            llm.embed({"prompt_token_ids": [5] * 65})
        cut = llm.embed({"prompt_token_ids": [5] * 65}, truncate_prompt_tokens=-1, use_tqdm=False)
        assert cut[0].prompt_token_ids == [5] * 64


def test_odd_files_are_refused_in_words(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (folder / file.name).symlink_to(file)
    modules = [{"path": "1_Pooling", "type": "m.Pooling"}, {"path": "2_Dense", "type": "m.Dense"}]
    good = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 48, "out_features": 20},
        "sentence_bert_config.json": {},
    }
    odd = {
        "modules.json": [{}, {"path": "1_Pooling"}, ["Pooling"]],
        "1_Pooling/config.json": [[], {"pooling_mode": 5}],
        "2_Dense/config.json": [{"out_features": 20}, {"in_features": "many", "out_features": 20}],
        "sentence_bert_config.json": [[64]],
    }
    cases = [(name, content) for name, contents in odd.items() for content in contents]
    for name, content in cases:
        for file, usual in good.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps(content if file == name else usual))
        with pytest.raises(ClientError) as refusal:
            resolve(EngineArgs(model=str(folder), load_format="dummy"))
        assert "\n" not in str(refusal.value), (name, content)


def test_smaller_embeddings(checkpoint: Callable[..., Path]) -> None:
    folder, prompts = checkpoint("llama"), prompts_of()
    hidden = hidden_states(folder, prompts)
    with engine(folder, runner="pooling", hf_overrides={"is_matryoshka": True}) as llm:
        for size in (7, 48):
            found = llm.embed(inputs_of(prompts), pooling_params=PoolingParams(dimensions=size), use_tqdm=False)
            expected = [F.normalize(h[-1, :size], dim=-1) for h in hidden]
            check([torch.tensor(o.outputs.embedding) for o in found], expected)
        with pytest.raises(ClientError, match="more than the model's 48"):
            llm.embed(inputs_of(prompts), pooling_params=PoolingParams(dimensions=49))
    sizes = {"matryoshka_dimensions": [8, 16]}
    with engine(folder, runner="pooling", hf_overrides=sizes, pooler_config=PoolerConfig(dimensions=16)) as llm:
        (found,) = llm.embed(inputs_of(prompts[:1]), use_tqdm=False)
        assert len(found.outputs.embedding) == 16
        with pytest.raises(ClientError, match="dimensions=9 is not one of this model's: 8, 16"):
            llm.embed(inputs_of(prompts), pooling_params=PoolingParams(dimensions=9))


@pytest.mark.parametrize(("tied", "difference"), [(True, True), (False, True), (False, False)])
def test_classes_that_are_tokens(checkpoint: Callable[..., Path], tmp_path: Path, tied: bool, difference: bool) -> None:
    """A language model that says yes or no, as Qwen3-Reranker does, by the rows of its head."""
    folder, prompts = tmp_path / "model", prompts_of()
    folder.mkdir()
    for file in checkpoint("qwen3", tie_word_embeddings=tied).iterdir():
        (folder / file.name).symlink_to(file)
    vocabulary = {"model": {"type": "BPE", "vocab": {"a": 0, "yes": 31, "no": 57}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": difference,
    }
    judge = harness.Judge(folder)
    both = [judge.logits(prompt)[-1][[57, 31]].softmax(-1) for prompt in prompts]
    with engine(folder, hf_overrides=overrides) as llm:
        found = llm.classify(inputs_of(prompts), use_tqdm=False)
        check([torch.tensor(o.outputs.probs) for o in found], [x[1:] if difference else x for x in both])
    overrides["classifier_from_token"] = ["no", "perhaps"]
    with pytest.raises(ClientError, match="no token 'perhaps'"), engine(folder, hf_overrides=overrides):
        pass
