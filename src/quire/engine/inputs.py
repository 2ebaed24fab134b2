"""From what the user wrote to a `Request` of integers.

Owns: the forms of a prompt, tokenization, the limits of model and engine, and what is filled in for the core (seed, end
tokens, bad words as tokens, lengths). Every refusal is one line that says what to change. Knows nothing of scheduling.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import msgspec

from quire.config.hub import tokenizer_folder
from quire.config.pooling import PoolingConfig
from quire.config.schema import Config
from quire.engine.tokenizer import NONE, Tokenizer
from quire.parsers.reasoning import reasoning_parser
from quire.runner.processors import processor_classes, validate
from quire.structured.compiler import compiled, compiler
from quire.types.errors import ClientError
from quire.types.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from quire.types.pooling import EMBED, TOKEN_EMBED, PoolingParams
from quire.types.prompts import PromptType
from quire.types.request import Request

Params = SamplingParams | BeamSearchParams | PoolingParams

CHARACTERS_A_TOKEN = 256  # more than the longest token of any vocabulary known
GRAMMARS_WAITING = 32  # most grammars that wait to be compiled where others must not wait for them
_SEED_MASK = 2**64 - 1
_NOT_YET = {  # fields that are accepted and checked, but do nothing so far
    "watermarking": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    "flat_logprobs": False,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "trace_decode_token_ids": None,
}
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt", "type", "token_type_ids"}
_MEDIA_KEYS = {"multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "prompt_embeds"}


class Draft(NamedTuple):
    """A checked prompt with its parameters: a request but for its id and seed. `text` is the prompt's, if known.
    `grammar` is done once the constraint, if there is one, is known to be good."""

    tokens: list[int]
    params: Params
    text: str | None
    cache_salt: str
    grammar: Future[Any] | None = None


class InputProcessor:
    """The input side of an engine. Seeds of requests that name none are drawn in the order of the calls of `request`,
    from a generator of its own that starts from the configuration's seed."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None) -> None:
        self._config, self._tokenizer = config, tokenizer
        name = config.structured.reasoning_parser
        self._reasoning = reasoning_parser(name) if name else None
        self._max_len = config.model.max_model_len
        self._vocab = config.model.arch.vocab_size
        self._max_logprobs = config.model.max_logprobs
        parallel = config.parallel
        self._processors_stay = parallel.distributed_executor_backend == "mp" or parallel.world_size > 1
        self._processors = processor_classes(config.model.logits_processors)
        self._random = random.Random(config.model.seed)
        eos = list(config.model.arch.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos.append(tokenizer.eos_token_id)
        self._eos = tuple(dict.fromkeys(t for t in eos if t < self._vocab))

    def process(
        self, prompt: PromptType, params: Params, *, request_id: str, priority: int = 0, lora_request: Any = None
    ) -> Request:
        """One prompt to a request. Raises ClientError."""
        (draft,) = self.drafts([prompt], [params], lora_request=lora_request)
        return self.request(draft, request_id, priority)

    def drafts(
        self,
        prompts: Sequence[PromptType],
        params: Sequence[Params],
        *,
        lora_request: Any = None,
        add_special_tokens: bool = True,
        wait: bool = True,
    ) -> list[Draft]:
        """Check prompts with their parameters, all or nothing: the first bad one raises and leaves no trace. Without
        `wait`, the caller waits for the drafts' grammars, and `BusyError` is raised where too many are waited for."""
        if lora_request is not None:
            raise ClientError("lora_request is not supported yet; leave it out", "lora_request", lora_request)
        for given in params:
            self._check_kind(given)
        parsed = [_parse(prompt) for prompt in prompts]
        if params and isinstance(params[0], PoolingParams):
            return self._pooled(parsed, prompts, params, add_special_tokens)
        texts = [text for text, tokens, _ in parsed if tokens is None and text is not None]
        encoded = iter(self._encode(texts, add_special_tokens))
        out: list[Draft] = []
        for (text, tokens, salt), given in zip(parsed, params, strict=True):
            tokens = next(encoded) if tokens is None else tokens
            out.append(self._draft(text, tokens, salt, given, wait))
        return out

    def _check_kind(self, given: Any) -> None:
        """Each engine has one kind of requests."""
        pooling = self._config.pooling
        if not isinstance(given, SamplingParams | BeamSearchParams | PoolingParams):
            kind = "SamplingParams" if pooling is None else "PoolingParams"
            text = f"{kind.lower().replace('params', '_params')} must be {kind}, got {type(given).__name__}"
            raise ClientError(text, kind.lower().replace("params", "_params"), given)
        if isinstance(given, PoolingParams) == (pooling is not None):
            return
        name = self._config.model.model
        if pooling is None:
            text = f"the model {name!r} generates text: to embed with it, make the engine with runner='pooling'"
            raise ClientError(text, "task", given.task if isinstance(given, PoolingParams) else None)
        text = f"the model {name!r} pools ({', '.join(pooling.tasks)}) and generates no text"
        raise ClientError(f"{text}: make the engine with runner='generate', if the checkpoint has a head", "runner")

    def _pooled(
        self, parsed: Sequence[_Parsed], prompts: Sequence[Any], params: Sequence[Any], special: bool
    ) -> list[Draft]:
        """Prompts of a model that pools."""
        pooling = self._config.pooling
        assert pooling is not None
        checked = [pooling_params(pooling, given, self._config.model.arch.hidden_size) for given in params]
        whole = [i for i, (_, tokens, _) in enumerate(parsed) if tokens is None and not self._cut(checked[i])]
        texts = [_lowered(parsed[i][0], pooling.lower) for i in whole]
        encoded = dict(zip(whole, self._encode(texts, special), strict=True))
        out: list[Draft] = []
        for i, (text, tokens, salt) in enumerate(parsed):
            most = self._cut(checked[i])
            side = checked[i].truncation_side or "right"
            if tokens is None and most:
                assert text is not None
                tokens = self._encode_cut(_lowered(text, pooling.lower), special, most, side)
            elif tokens is None:
                tokens = encoded[i]
            elif most:
                tokens = tokens[:most] if side == "right" else tokens[-most:]
            self._check_tokens(tokens, 0)
            checked[i].second_segment = _second_segment(prompts[i], len(tokens))
            out.append(Draft(tokens, checked[i], text, salt))
        return out

    def _cut(self, params: PoolingParams) -> int:
        """The number of tokens to keep at most; 0: all."""
        keep = params.truncate_prompt_tokens
        if keep is not None and keep > self._max_len:
            text = f"truncate_prompt_tokens must not exceed max_model_len={self._max_len}, got {keep}"
            raise ClientError(text, "truncate_prompt_tokens", keep)
        return 0 if keep is None else self._max_len if keep == -1 else keep

    def _encode_cut(self, text: str, special: bool, most: int, side: str) -> list[int]:
        """The tokens of a text, `most` of them at most, special ones among them."""
        if self._tokenizer is None:
            return self._encode([text], special)[0]
        self.check_length(text)
        return self._tokenizer.encode_cut(text, special, most, side)

    def request(self, draft: Draft, request_id: str, priority: int = 0, stream: bool = False) -> Request:
        """Give a draft its id and its seed. `stream`: a delta after each step is wanted."""
        params = draft.params
        seed = params.seed if isinstance(params, SamplingParams) else 0  # nothing is drawn
        if isinstance(params, SamplingParams):
            stream = stream or bool(params.stop)
        return Request(
            id=request_id,
            prompt_token_ids=draft.tokens,
            params=params,
            seed=self._random.getrandbits(64) if seed is None else seed & _SEED_MASK,
            eos_token_ids=self._eos,
            priority=priority,
            stream=stream,
            cache_salt=draft.cache_salt,
        )

    def check_length(self, text: str) -> None:
        """Raises `ClientError` for a text that it could take many seconds to tokenize, to no use."""
        if len(text) > CHARACTERS_A_TOKEN * self._max_len:
            told = f"the prompt has {len(text)} characters, far more than max_model_len={self._max_len} tokens can hold"
            raise ClientError(f"{told}: shorten it", "prompt", len(text))

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer is None:
            raise ClientError(f"a text prompt needs a tokenizer, {NONE}: give token ids", "prompt")
        for text in texts:
            self.check_length(text)
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0], add_special_tokens)]
        return self._tokenizer.encode_batch(texts, add_special_tokens)

    def _draft(self, text: str | None, tokens: list[int], salt: str, given: Any, wait: bool) -> Draft:
        params: SamplingParams | BeamSearchParams = given.clone()
        params.normalize()  # the user may have assigned to fields since
        if isinstance(params, SamplingParams):
            tokens = self._truncate(tokens, params)
        self._check_tokens(tokens)
        grammar: Future[Any] | None = None
        room = self._max_len - len(tokens)
        if isinstance(params, BeamSearchParams):
            self._check_beam(params)
            params.max_tokens = min(params.max_tokens, room)
        else:
            self._check_params(params)
            params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
            params.min_tokens = min(params.min_tokens, params.max_tokens)
            params.eos_token_ids = self._eos
            if params.structured_outputs is not None:
                grammar = self._constrain(params, params.structured_outputs, text, tokens, wait)
            if params.bad_words:
                params.bad_words_token_ids = self._bad_words(params.bad_words)
        return Draft(tokens, params, text, salt, grammar)

    def _truncate(self, tokens: list[int], params: SamplingParams) -> list[int]:
        keep = params.truncate_prompt_tokens
        if keep is None:
            return tokens
        if keep > self._max_len:
            text = f"truncate_prompt_tokens must not exceed max_model_len={self._max_len}, got {keep}"
            raise ClientError(text, "truncate_prompt_tokens", keep)
        return tokens[-(self._max_len - 1 if keep == -1 else keep) :]

    def _check_tokens(self, tokens: list[int], room: int = 1) -> None:
        """`room`: tokens that must fit behind them."""
        if not tokens:
            raise ClientError("the prompt is empty: give at least one token", "prompt", tokens)
        if len(tokens) + room > self._max_len:
            short = "leave no room for output in" if room else "are more than"
            raise ClientError(
                f"the prompt has {len(tokens)} tokens, which {short} max_model_len={self._max_len}:"
                " shorten it, set truncate_prompt_tokens, or raise max_model_len",
                "prompt",
                len(tokens),
            )
        self._check_vocab("prompt_token_ids", tokens)

    def _check_vocab(self, name: str, ids: Sequence[int]) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self._vocab):
            bad = next(t for t in ids if not 0 <= t < self._vocab)
            text = f"{name}: token id {bad} is not in the vocabulary of {self._vocab} (0..{self._vocab - 1})"
            raise ClientError(text, name, bad)

    def _check_beam(self, params: BeamSearchParams) -> None:
        if params.structured_outputs is not None:
            text = "beam search takes no structured_outputs: use sampling with n instead"
            raise ClientError(text, "structured_outputs")
        if params.watermarking is not None:
            raise ClientError("watermarking is not supported yet; leave it out", "watermarking", params.watermarking)
        self._check_vocab("allowed_token_ids", params.allowed_token_ids or ())
        width = params.beam_width
        most = self._vocab if self._max_logprobs == -1 else min(self._vocab, self._max_logprobs)
        if 2 * width > most:
            text = f"beam_width={width} takes the {2 * width} likeliest tokens a step, and max_logprobs allows {most}"
            raise ClientError(f"{text}: lower it, or raise max_logprobs", "beam_width", width)

    def _check_params(self, params: SamplingParams) -> None:
        for name, off in _NOT_YET.items():
            value = getattr(params, name)
            if value is not off:
                raise ClientError(f"{name} is not supported yet; leave it out", name, value)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is None or self._max_logprobs == -1:
                continue
            if (self._vocab if value == -1 else value) > self._max_logprobs:
                text = f"{name}={value} is more than the engine's max_logprobs={self._max_logprobs}; raise max_logprobs"
                raise ClientError(text, name, value)
        if params.logits_processors and self._processors_stay:
            raise ClientError(
                "logits_processors of a request cannot reach workers in processes of their own: name the class in the"
                " engine's logits_processors, or use distributed_executor_backend='uni' with one device",
                "logits_processors",
            )
        self._check_vocab("logprob_token_ids", params.logprob_token_ids or ())
        self._check_vocab("stop_token_ids", params.stop_token_ids or ())
        self._check_vocab("allowed_token_ids", params.allowed_token_ids or ())
        self._check_vocab("logit_bias", list(params.logit_bias or ()))
        validate(self._processors, params)
        if params.stop and self._tokenizer is None:
            text = f"stop strings need a tokenizer, {NONE}: use stop_token_ids"
            raise ClientError(text, "stop", params.stop)

    def _constrain(
        self, params: SamplingParams, given: StructuredOutputsParams, text: str | None, tokens: list[int], wait: bool
    ) -> Future[Any]:
        """Compile the constraint, so that a bad one is refused here; the workers are given its text."""
        if self._tokenizer is None:
            text = f"structured_outputs need a tokenizer, {NONE}"
            raise ClientError(text, "structured_outputs")
        config = self._config.structured
        if given.json is not None or given.json_object:
            given = msgspec.structs.replace(
                given,
                disable_any_whitespace=given.disable_any_whitespace
                or (config.disable_any_whitespace and given.whitespace_pattern is None),
                disable_additional_properties=given.disable_additional_properties
                or config.disable_additional_properties,
            )
        made = compiler(tokenizer_folder(self._config), self._vocab, self._eos, config.grammar_timeout)
        grammar = made.submit(given, None if wait else GRAMMARS_WAITING)
        if wait:
            compiled(grammar)
        params.structured_outputs = StructuredOutputsParams(grammar=made.source(given))
        if self._reasoning is not None and not config.enable_in_reasoning:
            shown = self._tokenizer.decode(tokens[-64:], skip_special_tokens=False) if text is None else text
            params.structured_after = self._reasoning.end if self._reasoning.begins(shown) else ""
        return grammar

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """The token sequences of each word: at the beginning of a text, and after a space unless that only puts
        something before the same tokens. (vLLM also wants both to be equally long, and so lets " word" pass where it is
        one token and "word" is several.)"""
        if self._tokenizer is None:
            raise ClientError(f"bad_words need a tokenizer, {NONE}", "bad_words", words)
        out: list[list[int]] = []
        for word in words:
            bare = self._tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if not bare:
                raise ClientError(f"bad_words: {word!r} has no tokens; leave it out", "bad_words", word)
            self._check_vocab("bad_words", bare + spaced)
            out.append(bare)
            if spaced[-len(bare) :] != bare:
                out.append(spaced)
        return out


_Parsed = tuple[str | None, list[int] | None, str]


def pooling_params(pooling: PoolingConfig, given: PoolingParams, size: int) -> PoolingParams:
    """A copy of the parameters in which nothing is left open. `size`: of the hidden states. Errors: `ClientError`."""
    params = given.clone()
    params.verify()  # the user may have assigned to fields since
    task = params.task or pooling.task
    if task not in pooling.tasks:
        raise ClientError(f"this model has the tasks {', '.join(pooling.tasks)}, not {task!r}", "task", task)
    params.task = task
    if task in (EMBED, TOKEN_EMBED):
        size = pooling.dense[-1].outputs if pooling.dense else size
        params.dimensions = _dimensions(pooling, params.dimensions, size)
    elif params.dimensions is not None:
        raise ClientError(f"dimensions is for embeddings, not for {task}: leave it out", "dimensions")
    params.skip_reading_prefix_cache = bool(params.skip_reading_prefix_cache) or pooling.whole(task)
    params.second_segment = None
    return params


def _dimensions(pooling: PoolingConfig, asked: int | None, size: int) -> int | None:
    if asked is None:
        asked = pooling.dimensions
    if asked is None or asked == size:
        return None
    if pooling.matryoshka is None:
        text = "dimensions: this model was not trained for embeddings of several sizes (matryoshka); if it was, say so"
        raise ClientError(f"{text} with hf_overrides={{'is_matryoshka': true}}", "dimensions", asked)
    if pooling.matryoshka and asked not in pooling.matryoshka:
        known = ", ".join(map(str, pooling.matryoshka))
        raise ClientError(f"dimensions={asked} is not one of this model's: {known}", "dimensions", asked)
    if asked > size:
        raise ClientError(f"dimensions={asked} is more than the model's {size}", "dimensions", asked)
    return asked


def _lowered(text: str | None, lower: bool) -> str:
    assert text is not None
    return text.lower() if lower else text


def _second_segment(prompt: Any, length: int) -> int | None:
    """Where the ones of a prompt's `token_type_ids` begin. Errors: `ClientError`."""
    types: Any = prompt.get("token_type_ids") if isinstance(prompt, Mapping) else None
    if types is None:
        return None
    types = _token_list(types, "token_type_ids")
    begin = types.index(1) if 1 in types else len(types)
    if len(types) != length or types != [0] * begin + [1] * (length - begin):
        text = "token_type_ids must be zeros and then ones, as many as there are tokens"
        raise ClientError(text, "token_type_ids", len(types))
    return begin


def default_params(config: Config) -> SamplingParams:
    """The model's sampling defaults. Errors: ClientError that says where they come from."""
    try:
        return SamplingParams.from_optional(**config.model.generation_config)
    except ClientError as e:
        text = f"{e}, in the model's generation_config: mend it, or give generation_config='quire' for plain defaults"
        raise ClientError(text, e.parameter, e.value) from e


def checked_priority(value: Any) -> int:
    """A request's priority. Errors: ClientError where it is no integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ClientError(f"priority must be an integer, got {value!r}", "priority", value)
    return int(value)


def _parse(prompt: Any) -> tuple[str | None, list[int] | None, str]:
    """(text, token ids, cache salt) of a prompt in any of its forms; at least one of the first two is given."""
    if isinstance(prompt, str):
        return prompt, None, ""
    if not isinstance(prompt, Mapping):
        return None, _token_list(prompt), ""
    fields: dict[str, Any] = {k: v for k, v in prompt.items() if v is not None}
    for key in fields:
        if key in _MEDIA_KEYS and fields[key]:
            raise ClientError(f"{key} is not supported yet: this model takes text only", key)
        if key not in _PROMPT_KEYS and key not in _MEDIA_KEYS:
            raise ClientError(f"unknown key {key!r} in a prompt; known are prompt, prompt_token_ids, cache_salt", key)
    text, salt = fields.get("prompt"), fields.get("cache_salt", "")
    if text is not None and not isinstance(text, str):
        raise ClientError(f"prompt must be a string, got {type(text).__name__}", "prompt", text)
    if not isinstance(salt, str):
        raise ClientError(f"cache_salt must be a string, got {type(salt).__name__}", "cache_salt", salt)
    if "prompt_token_ids" in fields:
        return text, _token_list(fields["prompt_token_ids"]), salt
    if text is None:
        raise ClientError("a prompt given as a dict needs 'prompt' (text) or 'prompt_token_ids'", "prompt", prompt)
    return text, None, salt


def _token_list(value: Any, name: str = "prompt_token_ids") -> list[int]:
    """A list of ints from a list, tuple or one-dimensional array."""
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple):
        if name != "prompt_token_ids":
            raise ClientError(f"{name} must be a list of integers, got {type(value).__name__}", name, value)
        text = f"a prompt must be text, a list of token ids, or a dict, got {type(value).__name__}"
        raise ClientError(text, "prompt", value)
    if set(map(type, items)) <= {int}:
        return list(items)
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise ClientError(f"{name} must be integers, got {item!r}", name, item)
    return [int(i) for i in items]
