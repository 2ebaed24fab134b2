"""How a request wants its tokens drawn: `SamplingParams`, `BeamSearchParams`.

Owns: the fields (vLLM's names and defaults), their ranges and what follows from them alone. Knows no vocabulary, model
or engine limits: the input processor checks those. The structs are mutable, as vLLM's are; the engine works on copies.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import operator
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, cast

import msgspec

from quire.types.errors import ClientError

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
MIN_TEMPERATURE = 1e-2
MAX_N = 16384
MAX_LOGPROB_TOKEN_IDS = 128


class RequestOutputKind(Enum):
    """What each output of a stream carries: all so far, only what is new, or one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class StructuredOutputsParams(msgspec.Struct, omit_defaults=True):
    """A constraint on the text: exactly one of

    `json`: a JSON schema, as a dict or as text; `regex`: a regular expression, which the whole text matches; `choice`:
    strings, one of which the text is; `grammar`: in Lark's notation or in GBNF; `json_object` (True): any JSON object;
    `structural_tag`: refused by the engine.

    For JSON: `disable_any_whitespace` allows no white space between its tokens, `whitespace_pattern` (a regex) what it
    matches; else there may be two blanks, or a line end and indentation. `disable_additional_properties` closes every
    object that does not say otherwise.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        self.normalize()

    def normalize(self) -> None:
        """Check every field; see `SamplingParams.normalize`."""
        if self.json_object is False:
            self.json_object = None
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [k for k in kinds if getattr(self, k) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            _refuse(f"structured_outputs needs exactly one of {', '.join(kinds)}; got {got}")
        if self.json is not None and not isinstance(self.json, str | dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            _refuse(f"structured_outputs.json must be a schema (a dict, or text), got {type(self.json).__name__}")
        for name in ("regex", "grammar", "structural_tag", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                _refuse(f"structured_outputs.{name} must be a string that is not empty, got {value!r}")
        if self.choice is not None:
            choice: Any = self.choice
            if not isinstance(choice, list | tuple) or not choice or not all(isinstance(c, str) and c for c in choice):  # pyright: ignore[reportUnknownVariableType]
                _refuse("structured_outputs.choice must be a list of strings, none of them empty")
            self.choice = list(dict.fromkeys(self.choice))
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            flag(f"structured_outputs.{name}", getattr(self, name))
        if self.json_object is not None:
            flag("structured_outputs.json_object", self.json_object)
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            _refuse("structured_outputs: disable_any_whitespace and whitespace_pattern contradict each other")


def _refuse(text: str) -> NoReturn:
    raise ClientError(text, "structured_outputs")


class RepetitionDetectionParams(msgspec.Struct):
    """End a sequence that repeats a pattern of `min_pattern_size..max_pattern_size` tokens `min_count` times."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


def integer(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> int:
    """`value` as an int in [low, high]; anything that is an integer by `__index__` will do, except a bool."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ClientError(f"{name} must be an integer, got {value!r}", name, value)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ClientError(f"{name} must be {bounds}{hint}, got {value!r}", name, value)
    return number


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """`value` as a finite float in [low, high], or (low, high] where `open_low`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, str | bool):
        raise ClientError(f"{name} must be a number, got {value!r}", name, value)
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        upper = "inf)" if high == math.inf else f"{high:g}]"
        raise ClientError(f"{name} must be in {'(' if open_low else '['}{low:g}, {upper}, got {value!r}", name, value)
    return number


def _strings(name: str, value: Any) -> list[str]:
    """None, one string or several, as a list of strings that are not empty."""
    if value is None:
        return []
    if not hasattr(value, "__iter__"):
        raise ClientError(f"{name} must be a string or a list of strings, got {value!r}", name, value)
    items: list[Any] = [value] if isinstance(value, str) else list(value)
    for item in items:
        if not isinstance(item, str) or not item:
            raise ClientError(f"{name} must contain only strings that are not empty, got {item!r}", name, value)
    return items


def _ids(name: str, value: Any) -> list[int]:
    """Token ids, without repetitions, in the order given."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise ClientError(f"{name} must be a list of token ids, got {value!r}", name, value)
    return list(dict.fromkeys(integer(name, v, 0) for v in value))


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ClientError(f"{name} must be True or False, got {value!r}", name, value)


_GONE = {  # of older vLLM
    "best_of": "ask for n outputs and choose among them",
    "use_beam_search": "call LLM.beam_search with BeamSearchParams",
    "beam_width": "call LLM.beam_search with BeamSearchParams",
    "length_penalty": "call LLM.beam_search with BeamSearchParams",
    "early_stopping": "call LLM.beam_search with BeamSearchParams",
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(...)",
    "max_new_tokens": "use max_tokens",
    "do_sample": "temperature=0 is greedy, anything above draws",
    "num_return_sequences": "use n",
}


class Named(msgspec.StructMeta):
    """Structs that answer a field which does not exist, or is missing, with what to write instead."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = cls.__struct_fields__
        for name, value in kwargs.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = _GONE.get(name) or (f"did you mean {near[0]}?" if near else "leave it out")
                raise ClientError(f"{cls.__name__} has no field {name!r}: {hint}", name, value)
        required = known[: len(known) - len(cls.__struct_defaults__)]
        if missing := [name for name in required[len(args) :] if name not in kwargs]:
            raise ClientError(f"{cls.__name__} needs {' and '.join(missing)}", missing[0])
        return super().__call__(*args, **kwargs)


_FLAGS = (
    "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "flat_logprobs",
)  # fmt: skip


class SamplingParams(msgspec.Struct, metaclass=Named, omit_defaults=True, tag=True):
    """Sampling of one request, with vLLM's fields and defaults.

    Args:
        n: sequences to generate for the prompt.
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted from the logits of tokens already generated (once;
            for each occurrence).
        repetition_penalty: > 0; divides the logits of tokens in the prompt or output (multiplies negative ones).
        temperature: in [0, 2]; 0 is greedy.
        top_p, top_k, min_p: keep the smallest set of tokens with mass top_p; the top_k likeliest (0 or -1: all);
            those with at least min_p times the probability of the likeliest.
        seed: 64-bit seed of the noise; None (or -1) lets the engine draw one.
        stop: strings that end a sequence; the output ends before them unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end a sequence.
        bad_words: strings that are not generated.
        ignore_eos: go on after the model's end token.
        max_tokens: most tokens to generate for a sequence; None: up to the model's length.
        min_tokens: tokens before which no stop condition applies.
        logprobs, prompt_logprobs: report this many likeliest tokens at each position besides the token itself; -1: all.
        logprob_token_ids: report these tokens (at most 128) at each position instead of the likeliest.
        detokenize: produce text; else `text` is empty.
        skip_special_tokens, spaces_between_special_tokens: how special tokens appear in the text.
        truncate_prompt_tokens: keep only the last k prompt tokens (-1: as many as the model's length allows).
        output_kind: see `RequestOutputKind`.
        stream_interval: least number of tokens between two outputs of a stream.
        logit_bias: added to the logits of these token ids, clamped to +-100.
        allowed_token_ids: only these may be generated.
        logits_processors: callables of this request, f(output_ids, logits_V) or f(prompt_ids, output_ids, logits_V),
            returning logits_V.
        structured_outputs: a constraint on the text; it ends with what is complete under it, whatever `ignore_eos` and
            `min_tokens` say. A dict of its fields will do.
        extra_args: passed on to engine-wide logits processors.
        bad_words_token_ids, eos_token_ids: filled by the engine, and so is `structured_after`: the text (the end of
            the reasoning) after which `structured_outputs` hold.

    Raises:
        ClientError: a value is out of its range, or two of them contradict each other.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    trace_decode_token_ids: list[int] | None = None
    logits_processors: list[Any] | None = None
    bad_words_token_ids: list[list[int]] = []
    eos_token_ids: tuple[int, ...] = ()
    structured_after: str = ""

    def __post_init__(self) -> None:
        self.normalize()

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """As the constructor, with None meaning the default, for callers that pass on what a client left out."""
        if "max_tokens" in fields and fields["max_tokens"] is None:
            return cls(**{k: v for k, v in fields.items() if v is not None}, max_tokens=None)
        return cls(**{k: v for k, v in fields.items() if v is not None})

    def normalize(self) -> None:
        """Check every field and bring it to its plain form (lists, ints, floats). Doing it twice changes nothing, so
        that it can be repeated after the user assigned to fields."""
        self._normalize_numbers()
        self._normalize_stops()
        self._normalize_logprobs()
        self._normalize_constraints()
        if self.greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.n > 1:
                raise ClientError(f"n must be 1 with greedy sampling (temperature=0), got n={self.n}", "n", self.n)

    def _normalize_numbers(self) -> None:
        self.n = integer("n", self.n, 1, MAX_N)
        self.presence_penalty = _number("presence_penalty", self.presence_penalty, -2, 2)
        self.frequency_penalty = _number("frequency_penalty", self.frequency_penalty, -2, 2)
        self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        self.temperature = _number("temperature", self.temperature, 0, 2)
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is too small to compute with; using %g", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        self.top_p = _number("top_p", self.top_p, 0, 1, open_low=True)
        self.top_k = max(0, integer("top_k", self.top_k, -1, hint=" (0 or -1: all tokens)"))
        self.min_p = _number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            seed = integer("seed", self.seed, -(2**63), 2**64 - 1)
            self.seed = None if seed == -1 else seed
        if self.max_tokens is not None:
            self.max_tokens = integer("max_tokens", self.max_tokens, 1, hint=" (None: up to the model's length)")
        self.min_tokens = integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = f"min_tokens must not exceed max_tokens={self.max_tokens}, got {self.min_tokens}"
            raise ClientError(text, "min_tokens", self.min_tokens)
        if self.truncate_prompt_tokens is not None:
            value = integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if value == 0:
                raise ClientError("truncate_prompt_tokens must be -1 or at least 1, got 0", "truncate_prompt_tokens", 0)
            self.truncate_prompt_tokens = value
        if self.stream_interval is not None:
            self.stream_interval = integer("stream_interval", self.stream_interval, 1)

    def _normalize_stops(self) -> None:
        for name in _FLAGS:
            flag(name, getattr(self, name))
        self.stop = _strings("stop", self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = [] if self.stop_token_ids is None else _ids("stop_token_ids", self.stop_token_ids)
        if self.stop and not self.detokenize:
            raise ClientError("stop strings need detokenize=True; use stop_token_ids instead", "stop", self.stop)
        kind: Any = self.output_kind
        if not isinstance(kind, RequestOutputKind):
            raise ClientError(f"output_kind must be a RequestOutputKind, got {kind!r}", "output_kind", kind)

    def _normalize_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                value = 1 if value else None
            setattr(self, name, None if value is None else integer(name, value, -1, hint=" (-1: the whole vocabulary)"))
        if self.logprob_token_ids is not None:
            ids = self.logprob_token_ids = _ids("logprob_token_ids", self.logprob_token_ids)
            if not 1 <= len(ids) <= MAX_LOGPROB_TOKEN_IDS:
                text = f"logprob_token_ids must name 1 to {MAX_LOGPROB_TOKEN_IDS} tokens, got {len(ids)}"
                raise ClientError(text, "logprob_token_ids", len(ids))
            if self.logprobs not in (None, len(ids)):
                text = f"logprobs={self.logprobs} contradicts the {len(ids)} logprob_token_ids: leave logprobs out"
                raise ClientError(text, "logprobs", self.logprobs)
        if self.skip_reading_prefix_cache is None and self.prompt_logprobs is not None:
            self.skip_reading_prefix_cache = True  # a cached position has no hidden state left to take logprobs from

    def _normalize_constraints(self) -> None:
        given: Any = self.structured_outputs
        if isinstance(given, Mapping):
            try:
                self.structured_outputs = msgspec.convert(given, StructuredOutputsParams)
            except msgspec.ValidationError as e:
                _refuse(f"structured_outputs: {e}")
        elif isinstance(given, StructuredOutputsParams):
            given.normalize()
        elif given is not None:
            _refuse(f"structured_outputs must be StructuredOutputsParams, got {type(given).__name__}")
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ClientError("allowed_token_ids must not be empty (None: all tokens)", "allowed_token_ids", [])
        if self.logit_bias is not None:
            bias: Any = self.logit_bias
            if not isinstance(bias, Mapping):
                raise ClientError(f"logit_bias must map token ids to numbers, got {bias!r}", "logit_bias", bias)
            self.logit_bias = {_bias_key(k): _bias_value(v) for k, v in cast(Mapping[Any, Any], bias).items()}
        extra: Any = self.extra_args
        if extra is not None and not isinstance(extra, Mapping):
            raise ClientError(f"extra_args must be a dict, got {extra!r}", "extra_args", extra)
        functions: Any = self.logits_processors or ()
        if not isinstance(functions, list | tuple):
            text = f"logits_processors must be a list of callables, got {functions!r}"
            raise ClientError(text, "logits_processors", functions)
        for f in cast(Sequence[Any], functions):
            if not callable(f):
                raise ClientError(f"logits_processors must be callables, got {f!r}", "logits_processors", f)

    def clone(self) -> SamplingParams:
        """A copy whose containers are its own; callables and `extra_args` values are shared. Not checked again."""
        new = copy.copy(self)
        for name in _CONTAINERS:
            if value := getattr(self, name):
                setattr(new, name, value.copy())
        return new

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether drawing a token needs the tokens before it, or the prompt's."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.bad_words
            or self.bad_words_token_ids
            or self.prompt_logprobs is not None
            or self.logits_processors
            or self.structured_outputs
        )

    @property
    def num_logprobs(self) -> int | None:
        """None, or how many tokens to report at each position besides its own: the likeliest (-1: all), or those of
        `logprob_token_ids`."""
        return len(self.logprob_token_ids) if self.logprob_token_ids else self.logprobs

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """The user's stop tokens and the model's end tokens: what may not be drawn before `min_tokens`."""
        return frozenset(self.stop_token_ids or ()) | frozenset(self.eos_token_ids)


_CONTAINERS = (
    "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "bad_words_token_ids",
    "logits_processors", "extra_args", "logprob_token_ids",
)  # fmt: skip


def _bias_key(key: Any) -> int:
    """A token id; JSON clients can only write strings."""
    try:
        return integer("logit_bias", int(key) if isinstance(key, str) else key, 0)
    except ValueError as e:
        raise ClientError(f"logit_bias keys must be token ids, got {key!r}", "logit_bias", key) from e


def _bias_value(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float) and not math.isnan(value):
        return min(100.0, max(-100.0, float(value)))
    raise ClientError(f"logit_bias values must be numbers, got {value!r}", "logit_bias", value)


class BeamSearchParams(msgspec.Struct, metaclass=Named, omit_defaults=True, tag=True):
    """Beam search of one request: the `beam_width` best lines of at most `max_tokens` tokens, ordered by
    sum of logprobs / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.normalize()

    def normalize(self) -> None:
        """Check every field; see `SamplingParams.normalize`."""
        self.beam_width = integer("beam_width", self.beam_width, 1)
        self.max_tokens = integer("max_tokens", self.max_tokens, 1)
        self.temperature = _number("temperature", self.temperature, 0, 2)
        self.length_penalty = _number("length_penalty", self.length_penalty, -math.inf, math.inf)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            flag(name, getattr(self, name))
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ClientError("allowed_token_ids must not be empty (None: all tokens)", "allowed_token_ids", [])

    def clone(self) -> BeamSearchParams:
        return copy.copy(self)
