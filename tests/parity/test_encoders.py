"""Encoders from Transformers' own code against the same models run one text at a time: embeddings, classes, tokens'
vectors and pairs, several texts in a step."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from test_pooling import check, enliven, inputs_of, prompts_of
from torch import Tensor
from torch.nn import functional as F

from quire import LLM, ClientError, PoolingParams
from quire.models.transformers import encoder

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 199,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "cls_token_id": 2,
    "sep_token_id": 2,
    "mask_token_id": 2,
}
SETTINGS: dict[str, Any] = {"skip_tokenizer_init": True, "disable_log_stats": True, "dtype": "float32"}
LOCAL = {"local_attention": 12, "global_attn_every_n_layers": 3}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("BertModel", {}),
    ("RobertaModel", {}),
    ("XLMRobertaModel", {}),
    ("DistilBertModel", {}),
    ("ModernBertModel", LOCAL),
    ("ElectraModel", {}),
    ("AlbertModel", {}),
    ("EuroBertModel", {"num_key_value_heads": 2}),
    ("NomicBertModel", {}),
]


def make(root: Path, name: str, **settings: Any) -> Path:
    folder, cls = root / name, getattr(transformers, name)
    torch.manual_seed(4)
    model = cls(cls.config_class(**{**SIZES, **settings}))
    enliven(model, 1.0)  # norms behind each layer let roundings grow: of twice the size, to a ten-thousandth
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def alone(folder: Path, auto: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([list(prompt)]))[0][0] for prompt in prompts]


@pytest.mark.parametrize(("name", "settings"), BODIES, ids=[name for name, _ in BODIES])
def test_embeddings(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    folder, prompts = make(tmp_path, name, **settings), prompts_of()
    hidden = alone(folder, transformers.AutoModel, prompts)
    with LLM(str(folder), max_num_seqs=8, **SETTINGS) as llm:
        assert llm.llm_engine.config.model.model_impl == "encoder"
        for mode, vector in (("cls", lambda h: h[0]), ("mean", lambda h: h.mean(0))):
            params = PoolingParams(use_activation=mode == "cls")
            if mode == "mean":
                llm.close()
                llm = LLM(str(folder), pooler_config={"pooling_type": "MEAN"}, **SETTINGS)
            found = llm.embed(inputs_of(prompts), pooling_params=params, use_tqdm=False)
            expected = [F.normalize(vector(h), dim=-1) if mode == "cls" else vector(h) for h in hidden]
            check([torch.tensor(o.outputs.embedding) for o in found], expected)
        raw = PoolingParams(use_activation=False)
        each = llm.encode(inputs_of(prompts), raw, pooling_task="token_embed", use_tqdm=False)
        check([o.outputs.data for o in each], hidden)
        assert [o.num_cached_tokens for o in each] == [0] * len(prompts)
        llm.close()


CLASSIFIERS = ["Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert", "Electra"]


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classes(tmp_path: Path, family: str, kind: str) -> None:
    folder, prompts = make(tmp_path, f"{family}For{kind}", num_labels=3), prompts_of()
    expected = alone(folder, getattr(transformers, f"AutoModelFor{kind}"), prompts)
    task = "classify" if kind.startswith("Sequence") else "token_classify"
    with LLM(str(folder), max_num_seqs=8, **SETTINGS) as llm:
        found = llm.encode(inputs_of(prompts), pooling_task=task, use_tqdm=False)
        check([o.outputs.data for o in found], [x.softmax(-1) for x in expected])
        raw = PoolingParams(use_activation=False)
        found = llm.encode(inputs_of(prompts), raw, pooling_task=task, use_tqdm=False)
        check([o.outputs.data for o in found], expected)
        with pytest.raises(ClientError, match=f"has the tasks {task}, not 'embed'"):
            llm.embed(inputs_of(prompts))


def tokenizer_into(folder: Path) -> Any:
    """Words, with BERT's separators and the types of both texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(150))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def text(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(150)}" for _ in range(count))


def test_pairs(tmp_path: Path) -> None:
    """A cross-encoder: both texts at once, told apart by their types, the longer one cut where both are too long."""
    folder = make(tmp_path, "BertForSequenceClassification", num_labels=1, pad_token_id=0)
    fast, draw = tokenizer_into(folder), random.Random(5)
    query, documents = text(draw, 7), [text(draw, n) for n in (1, 4, 30, 90, 4)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def score(first: str, second: str, types: bool = True, most: int = 130) -> float:
        ids = fast(first, second, return_tensors="pt", truncation="longest_first", max_length=most)
        if not types:
            ids.pop("token_type_ids")
        return float(model(**ids).logits[0, 0].sigmoid())

    with LLM(str(folder), **{**SETTINGS, "skip_tokenizer_init": False}) as llm:
        found = [o.outputs.score for o in llm.score(query, documents, use_tqdm=False)]
        assert found == pytest.approx([score(query, d) for d in documents], abs=1e-4)
        assert max(abs(found[i] - score(query, d, types=False)) for i, d in enumerate(documents)) > 0.01
        back = [o.outputs.score for o in llm.score(documents, [query] * 5, use_tqdm=False)]
        assert back == pytest.approx([score(d, query) for d in documents], abs=1e-4)
        for most in (9, 20, 40):
            (cut,) = llm.score(query, documents[3], truncate_prompt_tokens=most, use_tqdm=False)
            assert len(cut.prompt_token_ids) == most
            assert cut.outputs.score == pytest.approx(score(query, documents[3], most=most), abs=1e-4)
        with pytest.raises(ClientError, match="more than max_model_len=130"):
            llm.score(query, text(draw, 140))
        with pytest.raises(ClientError, match="make no pairs"):
            llm.score([query] * 2, documents)
    with LLM(str(folder), chat_template="{{ messages[1].content }} {{ messages[0].content }}",
             **{**SETTINGS, "skip_tokenizer_init": False}) as llm:  # fmt: skip
        (found,) = llm.score(query, documents[1], use_tqdm=False)
        assert found.prompt_token_ids == fast(f"{documents[1]} {query}").input_ids


def test_a_cosine(tmp_path: Path) -> None:
    folder = make(tmp_path, "BertModel", pad_token_id=0)
    fast, draw = tokenizer_into(folder), random.Random(5)
    first, second = [text(draw, n) for n in (3, 9, 20)], [text(draw, n) for n in (5, 2, 60)]
    with LLM(str(folder), **{**SETTINGS, "skip_tokenizer_init": False}) as llm:
        found = [o.outputs.score for o in llm.score(first, second, use_tqdm=False)]
    a, b = (alone(folder, transformers.AutoModel, [fast(t).input_ids for t in texts]) for texts in (first, second))
    expected = [float(F.cosine_similarity(x[0], y[0], dim=0)) for x, y in zip(a, b, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_one_type_of_text_is_enough_for_a_pair(tmp_path: Path) -> None:
    """XLM-R has one, whatever a tokenizer says of its tokens."""
    folder, ids = make(tmp_path, "XLMRobertaModel", type_vocab_size=1), [5, 6, 7, 8]
    with LLM(str(folder), **SETTINGS) as llm:
        prompts: list[Any] = [{"prompt_token_ids": ids, "token_type_ids": types} for types in ([0] * 4, [0, 0, 1, 1])]
        one, two = (o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False))
        for wrong in (5, [0, 0, "1", 1], [0, 0, 1]):
            with pytest.raises(ClientError, match="token_type_ids must be") as caught:
                llm.embed([{"prompt_token_ids": ids, "token_type_ids": wrong}])  # type: ignore[list-item]
            assert caught.value.parameter == "token_type_ids"
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("entry", [{"logit_sigma": "wide"}, {"logit_mean": "low"}, {"logit_sigma": 0}])
def test_odd_pooler_configs_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match=f"pooler_config: {next(iter(entry))}"):
        LLM(str(make(tmp_path, "BertForSequenceClassification")), pooler_config=entry, **SETTINGS)


def test_other_heads_in_the_checkpoint(tmp_path: Path) -> None:
    folder, prompts = make(tmp_path, "BertForMaskedLM"), prompts_of()
    with LLM(str(folder), **SETTINGS) as llm:
        found = llm.embed(inputs_of(prompts), use_tqdm=False)
    hidden = alone(folder, transformers.AutoModel, prompts)
    check([torch.tensor(o.outputs.embedding) for o in found], [F.normalize(h[0], dim=-1) for h in hidden])


@pytest.mark.parametrize("name", ["MPNetModel", "DebertaV2Model"])
def test_what_cannot_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClientError, match="computes its attention by itself"):
        LLM(str(make(tmp_path, name)), **SETTINGS)


def test_a_model_that_mixes_texts_is_refused_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "BertModel")
    one = encoder.Texts.set
    monkeypatch.setattr(encoder.Texts, "set", lambda self, lengths, device: one(self, [sum(lengths)], device))
    with pytest.raises(ClientError, match="other numbers for several texts in a step than for each alone"):
        LLM(str(folder), **SETTINGS)


def test_no_pages_and_no_pieces(tmp_path: Path) -> None:
    folder = make(tmp_path, "RobertaModel")
    with LLM(str(folder), max_num_batched_tokens=16, max_num_seqs=4, **SETTINGS) as llm:
        config = llm.llm_engine.config
        assert config.model.max_model_len == 128, "positions begin behind the padding's"
        assert config.scheduler.max_num_batched_tokens == 128 and not config.scheduler.enable_chunked_prefill
        stats = llm.llm_engine.stat_logger.stats
        assert stats.blocks_total == 0 and stats.kv_cache_usage == 0
        assert llm.llm_engine.client.block_map().runs == []  # type: ignore[attr-defined]
        assert len(llm.embed(inputs_of([[5] * 128] * 9), use_tqdm=False)) == 9
        with pytest.raises(ClientError, match="129 tokens, which are more than max_model_len=128"):
            llm.embed(inputs_of([[5] * 129]))
