"""What a model is for, and how its hidden states are pooled.

Owns: the rules which checkpoints generate and which pool (`runner`, `convert`, `task`), and everything about pooling
that the files beside the weights say: sentence-transformers' modules, heads for classification, labels. The result is a
`PoolingConfig`, with every default made concrete. Knows no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from quire.config.args import EngineArgs
from quire.types.errors import ClientError
from quire.types.pooling import CLASSIFY, EMBED, TASKS, TOKEN_CLASSIFY, TOKEN_EMBED
from quire.utils.logging import get_logger

log = get_logger(__name__)

POOLINGS = ("last", "cls", "mean", "max")
ACTIVATIONS = ("identity", "sigmoid", "softmax", "tanh", "relu", "gelu")
# How an architecture's name ends, and what the model is then for.
_ENDS = (
    ("ForCausalLM", None),
    ("ForConditionalGeneration", None),
    ("LMHeadModel", None),
    ("ForSequenceClassification", CLASSIFY),
    ("ForTokenClassification", CLASSIFY),
    ("ForProcessRewardModel", CLASSIFY),
    ("ForRewardModel", CLASSIFY),
    ("ForTextEncoding", EMBED),
    ("ForMaskedLM", EMBED),
    ("ForPreTraining", EMBED),
    ("EmbeddingModel", EMBED),
    ("Model", EMBED),
)
_OLD_TASKS = {"embed": EMBED, "embedding": EMBED, "classify": CLASSIFY}


class PoolerConfig(dict[str, Any]):
    """The value of `pooler_config`, under vLLM's name for it: a dict that is written as a call."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """A linear layer that sentence-transformers puts behind the pooling; `folder`: of its weights."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """How a model pools. `kind`: "embed" or "classify"; `tasks`: those that requests may ask for, `task` the one they
    mean if they name none (None: they must).

    `pooling`: which hidden states make up the vector of a prompt. `normalize`: embeddings have length 1 by default.
    `matryoshka`: sizes to which they may be cut; empty: any size; None: none; `dimensions`: to which they are if a
    request does not say.
    `labels`: names of the classes, in their order. `activation`: from logits to scores; `mean`, `sigma`: logits are
    moved and scaled first. `head`: the names of the head's linear layers in the checkpoint, with ReLU in between.
    `tokens`: the classes are these tokens of the language model's head; `difference`: the one class is the second
    against the first. `per_token`: the head was trained on single tokens. `pairs`: the texts of a pair come with the
    tokenizer's separators. `causal`: tokens see those before them only; a model in which they see all computes a prompt
    at once, and has a head of its own for classes. `lower`: texts are in lower case.
    """

    kind: str
    tasks: tuple[str, ...]
    task: str | None = None
    pooling: str = "last"
    normalize: bool = True
    dense: tuple[DenseConfig, ...] = ()
    matryoshka: tuple[int, ...] | None = None
    dimensions: int | None = None
    labels: tuple[str, ...] = ()
    activation: str = "softmax"
    mean: float = 0.0
    sigma: float = 1.0
    head: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    difference: bool = False
    per_token: bool = False
    pairs: bool = True
    lower: bool = False
    causal: bool = True

    @property
    def scores_pairs(self) -> bool:
        """Whether one pass over a pair of texts gives its score."""
        return self.kind == CLASSIFY and len(self.labels) == 1 and not self.per_token

    def whole(self, task: str) -> bool:
        """Whether a task needs the hidden states of all positions, or the first one's, and not the last one's alone."""
        return task in (TOKEN_EMBED, TOKEN_CLASSIFY) or self.pooling != "last"


def pooling_kind(args: EngineArgs, architecture: str, path: Path) -> str | None:
    """ "embed" or "classify"; None: the model generates. Errors: `ClientError`."""
    kind = _chosen(args, _kind_of(architecture), architecture, path)
    if kind is None:
        for name in ("pooler_config", "override_pooler_config"):
            if getattr(args, name):
                text = f"{name} is for models that pool, and {architecture} generates: add runner='pooling'"
                raise ClientError(text, name)
    return kind


def pooling_of(
    kind: str | None, args: EngineArgs, raw: Mapping[str, Any], architecture: str, path: Path, encoder: bool
) -> PoolingConfig | None:
    """How the model in `path` pools, if it does. `encoder`: its tokens see those that follow. Errors: `ClientError`."""
    if kind is None:
        return None
    try:
        if kind == EMBED:
            config = _embedding(raw, path, "cls" if encoder else "last")
        else:
            config = _classification(raw, architecture, path, args.tokenizer)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, ClientError):
            raise
        text = f"config.json, or what sentence-transformers keeps beside it, in {path} is not as these files are"
        raise ClientError(f"{text} ({type(e).__name__}: {e})", "model", str(path)) from e
    if encoder:
        config = _for_encoder(config)
    config = _overridden(config, args.pooler_config or args.override_pooler_config)
    if kind == EMBED or config.causal:
        log.info("pooling: %s of the hidden states, for %s", config.pooling, ", ".join(config.tasks))
    else:
        log.info("pooling: by the model's own head, for %s", ", ".join(config.tasks))
    return config


def _for_encoder(config: PoolingConfig) -> PoolingConfig:
    """Its own code has the head for classes."""
    if config.tokens:
        raise ClientError("classifier_from_token is for language models, not for encoders", "hf_overrides")
    tasks = config.tasks if config.kind == EMBED else (TOKEN_CLASSIFY,) if config.per_token else (CLASSIFY,)
    return replace(config, causal=False, tasks=tasks, head=())


def _is_decoder(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _kind_of(architecture: str) -> str | None:
    """What an architecture is for by its name; None: to generate."""
    return next((kind for end, kind in _ENDS if architecture.endswith(end)), None)


def _chosen(args: EngineArgs, own: str | None, architecture: str, path: Path) -> str | None:
    asked = None if args.convert in ("auto", "none") else args.convert
    runner = args.runner
    if args.task != "auto":
        wanted = "generate" if args.task == "generate" else "pooling"
        if runner not in ("auto", wanted):
            raise ClientError(f"task={args.task!r} contradicts runner={runner!r}: leave task out", "task", args.task)
        runner = wanted
        if wanted == "pooling":  # scores and rewards come from either kind
            asked = asked or _OLD_TASKS.get(args.task) or own or EMBED
    if runner == "auto":
        pools = own is not None or asked is not None or (path / "modules.json").is_file()
        runner = "pooling" if pools else "generate"
    if runner == "generate":
        if asked is not None:
            raise ClientError(f"convert={args.convert!r} needs runner='pooling'", "convert", args.convert)
        if own is not None:
            text = f"{architecture} has no head that generates text: leave runner out, or give a checkpoint with one"
            raise ClientError(text, "runner", "generate")
        return None
    if asked is None and own is None and args.convert == "none":
        text = f"{architecture} generates: runner='pooling' needs convert='embed' or 'classify'"
        raise ClientError(text, "convert", args.convert)
    return asked or own or EMBED


# -- embeddings ------------------------------------------------------------------------------------------------------


def _embedding(raw: Mapping[str, Any], path: Path, mode: str) -> PoolingConfig:
    config = PoolingConfig(kind=EMBED, tasks=(EMBED, TOKEN_EMBED), task=EMBED, pooling=mode)
    sizes = raw.get("matryoshka_dimensions")
    if sizes or raw.get("is_matryoshka"):
        config = replace(config, matryoshka=tuple(int(size) for size in sizes or ()))
    config = replace(config, lower=bool(sentence_settings(path).get("do_lower_case")))
    modules = _modules(path)
    pooled = [module for kind, module in modules if kind == "Pooling"]
    if not pooled:
        return config
    config = replace(config, pooling=_mode(pooled[0]), normalize=any(kind == "Normalize" for kind, _ in modules))
    dense = tuple(_dense(folder) for kind, folder in modules if kind == "Dense")
    return replace(config, dense=dense)


def sentence_settings(path: Path) -> dict[str, Any]:
    """sentence_bert_config.json, {} where there is none."""
    file = path / "sentence_bert_config.json"
    return _json(file) if file.is_file() else {}


def _modules(path: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of sentence-transformers' modules, in their order. Errors: `ClientError` for unknown kinds."""
    if not (path / "modules.json").is_file():
        return []
    found: list[tuple[str, Path]] = []
    for module in cast(list[dict[str, Any]], _json(path / "modules.json", list)):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize", "Dense", "Dropout"):
            text = f"modules.json of the checkpoint has a module {kind!r}, which is not in quire: Pooling, Dense and"
            raise ClientError(f"{text} Normalize are; remove the file to go without", "model", str(path))
        found.append((kind, path / str(module.get("path", ""))))
    return found


def _mode(folder: Path) -> str:
    raw = _json(folder / "config.json")
    known = {"cls_token": "cls", "lasttoken": "last", "mean_tokens": "mean", "max_tokens": "max"}
    given: Any = raw.get("pooling_mode")
    names: list[str] = [given] if isinstance(given, str) else list(given or ())
    names += [name.removeprefix("pooling_mode_") for name, on in raw.items() if name.startswith("pooling_mode_") and on]
    modes = [known.get(name, name) for name in names]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        text = f"{folder / 'config.json'} pools by {' and '.join(modes) or 'nothing'}; quire has {', '.join(POOLINGS)}"
        raise ClientError(f"{text}: choose one with pooler_config={{'pooling_type': ...}}", "model", str(folder))
    if raw.get("include_prompt") is False:
        log.warning("%s: include_prompt=false is not followed; the tokens of prompts are pooled too", folder)
    return modes[0]


def _dense(folder: Path) -> DenseConfig:
    raw = _json(folder / "config.json")
    return DenseConfig(
        folder=folder,
        inputs=int(raw["in_features"]),
        outputs=int(raw["out_features"]),
        bias=bool(raw.get("bias", True)),
        activation=_activation(str(raw.get("activation_function", "torch.nn.modules.activation.Tanh"))),
    )


def _activation(name: str) -> str:
    """The activation that a class of torch (`torch.nn.modules.activation.Tanh`) is."""
    found = name.rpartition(".")[2].lower()
    if found not in ACTIVATIONS:
        text = f"the activation {name!r} of the checkpoint is not in quire, which has {', '.join(ACTIVATIONS)}"
        raise ClientError(text, "model", name)
    return found


# -- classification --------------------------------------------------------------------------------------------------


def _classification(raw: Mapping[str, Any], architecture: str, path: Path, tokenizer: str | None) -> PoolingConfig:
    tokens: Any = raw.get("classifier_from_token")
    if tokens:
        return _from_tokens(raw, [str(token) for token in tokens], path, tokenizer)
    if _is_decoder(architecture):
        text = f"{architecture} has no head that classifies: convert='classify' needs a checkpoint with one, or"
        raise ClientError(f"{text} hf_overrides={{'classifier_from_token': ['no', 'yes']}}", "convert", "classify")
    labels = _labels(raw)
    reward, process = architecture.endswith("RewardModel"), architecture.endswith("ProcessRewardModel")
    per_token = architecture.endswith("ForTokenClassification") or reward
    config = PoolingConfig(
        kind=CLASSIFY,
        tasks=(TOKEN_CLASSIFY,) if per_token else (CLASSIFY, TOKEN_CLASSIFY),
        task=TOKEN_CLASSIFY if per_token else CLASSIFY,
        labels=labels,
        per_token=per_token,
    )
    head = ("score",)
    if reward:
        size = int(raw.get("num_labels") or (2 if process else 1))
        config = replace(config, labels=tuple(f"LABEL_{i}" for i in range(size)))
        head = ("score.0", "score.2")
    elif architecture == "GPT2ForTokenClassification":
        head = ("classifier",)
    activation = _classifier_activation(raw, len(config.labels))
    return replace(config, head=head, activation="identity" if reward and not process else activation)


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Transformers' rule: the names, else so many as there are to be, else two."""
    names: Any = raw.get("id2label")
    if names:
        return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    return tuple(f"LABEL_{i}" for i in range(int(raw.get("num_labels") or 2)))


def _classifier_activation(raw: Mapping[str, Any], classes: int) -> str:
    """What the checkpoint names, else what its kind of problem or the number of classes asks for."""
    sentence: Any = raw.get("sentence_transformers") or {}
    named = sentence.get("activation_fn") or raw.get("sbert_ce_default_activation_function")
    if named:
        return _activation(str(named))
    match raw.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case _:
            return "sigmoid" if classes == 1 else "softmax"


def _from_tokens(raw: Mapping[str, Any], tokens: list[str], path: Path, tokenizer: str | None) -> PoolingConfig:
    """A language model that answers with one of some tokens, as Qwen3-Reranker does."""
    difference = bool(raw.get("is_original_qwen3_reranker"))
    if len(tokens) < 2 and difference:
        raise ClientError("is_original_qwen3_reranker needs two tokens in classifier_from_token", "hf_overrides")
    folder = Path(tokenizer) if tokenizer and Path(tokenizer).is_dir() else path
    return PoolingConfig(
        kind=CLASSIFY,
        tasks=(CLASSIFY, TOKEN_CLASSIFY),
        task=CLASSIFY,
        labels=("LABEL_0",) if difference else tuple(tokens),
        activation=_classifier_activation(raw, 1 if difference else len(tokens)),
        tokens=_vocabulary_ids(folder, tokens),
        difference=difference,
        pairs=bool(raw.get("use_sep_token", False)),
    )


def _vocabulary_ids(folder: Path, tokens: list[str]) -> tuple[int, ...]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ClientError(f"classifier_from_token needs tokenizer.json in {folder}", "hf_overrides", tokens)
    raw = _json(file)
    known: dict[str, int] = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
    vocabulary: Any = raw["model"].get("vocab")
    if isinstance(vocabulary, dict):
        known.update(cast(dict[str, int], vocabulary))
    unknown = [token for token in tokens if token not in known]
    if unknown:
        text = f"classifier_from_token: the tokenizer has no token {unknown[0]!r}"
        raise ClientError(text, "hf_overrides", unknown[0])
    return tuple(known[token] for token in tokens)


# -- what the user says ----------------------------------------------------------------------------------------------


def _overridden(config: PoolingConfig, given: Mapping[str, Any] | None) -> PoolingConfig:
    for name, value in (given or {}).items():
        if value is not None:
            config = _changed(config, name, value)
    return config


def _changed(config: PoolingConfig, name: str, value: Any) -> PoolingConfig:
    """One entry of `pooler_config`. Errors: `ClientError`."""
    match name:
        case "pooling_type" | "seq_pooling_type" if config.kind == CLASSIFY and not config.causal:
            raise ClientError(f"pooler_config: {name} is the model's own affair here: leave it out", "pooler_config")
        case "pooling_type" | "seq_pooling_type":
            mode = str(value).lower()
            if name == "pooling_type" and mode == "all":
                return replace(config, task=next(task for task in config.tasks if task.startswith("token")))
            if mode not in POOLINGS:
                known = ", ".join(POOLINGS).upper()
                raise ClientError(f"pooler_config: {name}={value!r} must be one of {known}", "pooler_config", value)
            return replace(config, pooling=mode)
        case "tok_pooling_type" if str(value).lower() == "all":
            return config
        case "use_activation" | "normalize" | "softmax" | "activation" if isinstance(value, bool):
            if config.kind == EMBED:
                return replace(config, normalize=value)
            return config if value else replace(config, activation="identity")
        case "dimensions" if isinstance(value, int) and value > 0:
            return replace(config, dimensions=value)
        case "logit_mean" | "logit_bias" if isinstance(value, int | float):
            return replace(config, mean=float(value))
        case "logit_sigma" if isinstance(value, int | float) and value:
            return replace(config, sigma=float(value))
        case "task" if value in TASKS:
            if value not in config.tasks:
                text = f"pooler_config: this model has {', '.join(config.tasks)}, not {value!r}"
                raise ClientError(text, "pooler_config", value)
            return replace(config, task=str(value))
        case "enable_chunked_processing" | "max_embed_len" | "enable_flash_late_interaction":
            log.info("pooler_config: %s has no effect; prompts are computed in chunks up to max_model_len", name)
            return config
        case _:
            text = f"pooler_config: {name}={value!r} is not known; there are pooling_type, use_activation, task,"
            raise ClientError(f"{text} logit_mean, logit_sigma", "pooler_config", value)


def _json(file: Path, kind: type = dict) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ClientError(f"{file} cannot be read: {e}", "model", str(file)) from e
    if not isinstance(found, kind):
        raise ClientError(f"{file} holds no {'list' if kind is list else 'object'}", "model", str(file))
    return found
