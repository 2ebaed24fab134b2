"""The offline interface: `LLM`, with vLLM's methods and argument names.

Owns: batches of prompts from submission to ordered results. The engine runs in the caller's thread. Knows no
scheduling; what a prompt was pooled to is the only tensor that it sees.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.engine.chat import Message, load_template, render_chat
from quire.engine.foreground import Interrupts, Progress, UseTqdm
from quire.engine.inputs import Params, checked_priority, default_params
from quire.engine.llm_engine import LLMEngine
from quire.engine.outputs import Output
from quire.engine.scoring import Plan as ScorePlan
from quire.engine.stat_logger import Metric
from quire.engine.tokenizer import NONE
from quire.types.errors import ClientError, EngineError
from quire.types.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    error_of,
)
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.types.pooling import CLASSIFY, EMBED, TASKS, PoolingParams
from quire.types.prompts import PromptType
from quire.utils.logging import setup_logging

logger = logging.getLogger(__name__)


class LLM:
    """A model, ready to generate, or to embed, classify and score where it pools (`runner`).

    `LLM(model, **engine_args)`: the arguments are those of `EngineArgs` (docs/configuration.md lists them), named as in
    vLLM. `model` is a folder, a Hub id, or "demo", the bundled model. Raises ClientError for arguments that cannot be
    met. Use it as a context manager, or call `close`, to release the model's memory early.
    """

    def __init__(self, model: str = "demo", *, disable_log_stats: bool = True, **engine_args: Any) -> None:
        args = EngineArgs(model=model, disable_log_stats=disable_log_stats, **engine_args)
        setup_logging(args.log_level, args.log_format)
        self._use(LLMEngine(resolve(args)))

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        setup_logging(engine_args.log_level, engine_args.log_format)
        return cls.from_engine(LLMEngine(resolve(engine_args)))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> LLM:
        """Around an engine that was made already."""
        llm = cls.__new__(cls)
        llm._use(engine)
        return llm

    def _use(self, engine: LLMEngine) -> None:
        self.llm_engine = engine
        self._numbers = itertools.count()
        self._enqueued: list[str] = []
        self._done: dict[str, Output] = {}

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate for each prompt; results come in the order of the prompts.

        Args:
            prompts: text, token ids, a `TextPrompt` or `TokensPrompt`, or a list of these.
            sampling_params: for all prompts, or one for each; by default `get_default_sampling_params()`.
            use_tqdm: show a progress bar; or a callable to make it, with tqdm's arguments.
            priority: one number for each prompt; the lower, the earlier (with scheduling_policy="priority").
            prompt_token_ids: instead of `prompts`; an older spelling.
            tokenization_kwargs: `add_special_tokens` (default True).

        Raises:
            ClientError: something is wrong with a prompt or its parameters; then none has been started.
        """
        _no_media(mm_processor_kwargs)
        if prompt_token_ids is not None:
            if prompts is not None:
                raise ClientError("give prompts or prompt_token_ids, not both", "prompt_token_ids")
            prompts = prompt_token_ids  # type: ignore[assignment]
        if prompts is None:
            raise ClientError("prompts is missing", "prompts")
        special = _add_special_tokens(tokenization_kwargs)
        return _texts(self._batch(_listed(prompts), sampling_params, use_tqdm, lora_request, priority, special))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of a conversation, or of each in a list of conversations.

        A message is a dict with `role` and `content` (text, or a list of text parts). `chat_template`: Jinja source or
        a file, instead of the tokenizer's. `tools`: descriptions handed to the template. See `generate` for the rest.
        """
        _no_media(mm_processor_kwargs)
        # A template writes the special tokens itself.
        special = _add_special_tokens(tokenization_kwargs, default=False)
        prompts = self._render(
            messages,
            chat_template,
            chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=chat_template_kwargs,
        )
        return _texts(self._batch(prompts, sampling_params, use_tqdm, lora_request, priority, special))

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        lora_request: Any = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """The `params.beam_width` best continuations of each prompt, best first. `tokens` and `text` of a beam include
        the prompt. `concurrency_limit`: most prompts at a time."""
        if not isinstance(params, BeamSearchParams):
            raise ClientError(f"params must be BeamSearchParams, got {type(params).__name__}", "params", params)
        if concurrency_limit is not None and (not isinstance(concurrency_limit, int) or concurrency_limit < 1):
            text = f"concurrency_limit must be an integer of at least 1, got {concurrency_limit!r}"
            raise ClientError(text, "concurrency_limit", concurrency_limit)
        listed = _listed(prompts)
        _one_each(priority, listed, "priority")
        size = concurrency_limit or max(1, len(listed))
        outputs: list[RequestOutput] = []
        for i in range(0, len(listed), size):
            some = None if priority is None else priority[i : i + size]
            outputs += _texts(self._batch(listed[i : i + size], params, use_tqdm, lora_request, some, True))
        return [_beams(output) for output in outputs]

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The vectors of each prompt, as tensors: one ("embed", "classify") or one for each of its tokens
        ("token_embed", "token_classify"), as `pooling_task` or `PoolingParams.task` says. For the rest see `generate`.

        Args:
            truncate_prompt_tokens: see `PoolingParams`.
            tokenization_kwargs: `add_special_tokens` (default True), `truncate_prompt_tokens`, `truncation_side`.
        """
        if pooling_task is not None and pooling_task not in TASKS:
            text = f"pooling_task must be one of {', '.join(TASKS)}, got {pooling_task!r}"
            raise ClientError(text, "pooling_task", pooling_task)
        known = self.llm_engine.config.pooling
        single = pooling_params if isinstance(pooling_params, PoolingParams) else None
        several = isinstance(pooling_params, list | tuple)
        if pooling_task is None and known is not None and not several and (single is None or single.task is None):
            named = ", ".join(known.tasks)
            raise ClientError(f"encode needs pooling_task: this model has {named}", "pooling_task")
        found = self._pool(
            prompts, pooling_params, pooling_task, use_tqdm, lora_request, priority, truncate_prompt_tokens,
            tokenization_kwargs,
        )  # fmt: skip
        import torch

        for output in found:
            output.outputs.data = torch.tensor(output.outputs.data)
        return found

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt; see `encode`."""
        found = self._pool(
            prompts, pooling_params, EMBED, use_tqdm, lora_request, priority, truncate_prompt_tokens,
            tokenization_kwargs,
        )  # fmt: skip
        return [_as(EmbeddingRequestOutput, o, EmbeddingOutput(o.outputs.data.tolist())) for o in found]

    def classify(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probabilities of each prompt's classes; see `encode`."""
        found = self._pool(
            prompts, pooling_params, CLASSIFY, use_tqdm, lora_request, priority, truncate_prompt_tokens,
            tokenization_kwargs,
        )  # fmt: skip
        return [_as(ClassificationRequestOutput, o, ClassificationOutput(o.outputs.data.tolist())) for o in found]

    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        priority: int = 0,
    ) -> list[ScoringRequestOutput]:
        """How well texts belong together, pair by pair: one with one, one with each of several, or several with as
        many. A model that classifies pairs (one label) sees both texts at once; of an embedder it is the cosine.
        `chat_template`: Jinja source or a file, which writes the roles `query` and `document` as one prompt."""
        engine = self.llm_engine
        template = chat_template or engine.config.model.chat_template
        params = _pooling_kwargs(pooling_params or PoolingParams(), truncate_prompt_tokens, tokenization_kwargs)
        plan = ScorePlan(engine.config, engine.tokenizer, data_1, data_2, params, template)
        ranks = [priority] * len(plan.prompts)
        outputs = self._batch(plan.prompts, plan.params, use_tqdm, lora_request, ranks, plan.add_special_tokens)
        return [_as(ScoringRequestOutput, o, ScoringOutput(score)) for o, score in plan.scores(_vectors(outputs))]

    def _pool(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: PoolingParams | Sequence[PoolingParams] | None,
        task: str | None,
        use_tqdm: UseTqdm,
        lora_request: Any,
        priority: Sequence[int] | None,
        truncate: int | None,
        kwargs: Mapping[str, Any] | None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        listed = _listed(prompts)
        given: list[Any] = list(params) if isinstance(params, list | tuple) else [params or PoolingParams()]
        each = [_pooling_kwargs(one, truncate, kwargs) for one in given]
        for one in each:
            if task is not None and one.task not in (None, task):
                raise ClientError(f"task={one.task!r} of the pooling_params contradicts {task!r}", "task", one.task)
            one.task = task or one.task
        many: Any = each if isinstance(params, list | tuple) else each[0]
        special = bool((kwargs or {}).get("add_special_tokens", True))
        return _vectors(self._batch(listed, many, use_tqdm, lora_request, priority, special))

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: UseTqdm = True,
    ) -> list[str]:
        """Submit prompts without waiting; answers their request ids. See `wait_for_completion`."""
        special = _add_special_tokens(tokenization_kwargs)
        ids = self._submit(_listed(prompts), sampling_params, lora_request, priority, special)
        self._enqueued += ids
        return ids

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        **template: Any,
    ) -> list[str]:
        """As `enqueue`, for conversations; see `chat`."""
        prompts = self._render(messages, chat_template, chat_template_content_format, **template)
        ids = self._submit(prompts, sampling_params, lora_request, priority, add_special_tokens=False)
        self._enqueued += ids
        return ids

    def wait_for_completion(self, output_type: type | None = None, *, use_tqdm: UseTqdm = True) -> list[RequestOutput]:
        """The results of everything enqueued so far, in the order in which it was."""
        with Interrupts() as interrupts:
            ids, self._enqueued = self._enqueued, []
            return _texts(self._wait(ids, use_tqdm, interrupts))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as an object of Transformers."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, on top of the defaults."""
        return default_params(self.llm_engine.config)

    def get_metrics(self) -> list[Metric]:
        return self.llm_engine.stat_logger.metrics()

    def get_world_size(self, include_dp: bool = True) -> int:
        """Devices in use; `include_dp` counts those of data-parallel replicas too."""
        parallel = self.llm_engine.config.parallel
        return parallel.world_size * (parallel.data_parallel_size if include_dp else 1)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget cached prefixes; False if requests in flight prevent it."""
        if reset_running_requests or reset_connector:
            raise ClientError("reset_running_requests and reset_connector are not supported yet", "reset_prefix_cache")
        return self.llm_engine.client.reset_prefix_cache()

    def __getattr__(self, name: str) -> Any:
        # Only called for what does not exist; `hasattr` stays false for it.
        reason = _NOT_HERE.get(name)
        text = f"LLM.{name} is not in quire: {reason}" if reason else f"'LLM' object has no attribute {name!r}"
        raise AttributeError(text)

    def close(self) -> None:
        """Release the model. The object cannot be used after it."""
        self.llm_engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _render(
        self, messages: Sequence[Any], template: str | None, content_format: str, **options: Any
    ) -> list[PromptType]:
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            text = f"messages must be a list of dicts with 'role' and 'content', got {messages!r}"
            raise ClientError(text, "messages", messages)
        if not messages:
            raise ClientError("the conversation has no messages", "messages", messages)
        tokenizer = self.llm_engine.tokenizer
        if tokenizer is None:
            raise ClientError(f"chat needs a tokenizer, {NONE}: use generate with token ids", "messages")
        template = template or self.llm_engine.config.model.chat_template
        if template is not None and template not in tokenizer.chat_templates:
            template = load_template(template)
        several = isinstance(messages[0], Sequence) and not isinstance(messages[0], str)
        conversations: Sequence[Any] = messages if several else [messages]
        return [
            render_chat(tokenizer, c, chat_template=template, content_format=content_format, **options)
            for c in conversations
        ]

    def _batch(
        self,
        prompts: Sequence[PromptType],
        params: Params | Sequence[Params] | None,
        use_tqdm: UseTqdm,
        lora_request: Any,
        priority: Sequence[int] | None,
        add_special_tokens: bool,
    ) -> list[Output]:
        with Interrupts() as interrupts:
            ids = self._submit(prompts, params, lora_request, priority, add_special_tokens)
            return self._wait(ids, use_tqdm, interrupts)

    def _submit(
        self,
        prompts: Sequence[PromptType],
        params: Params | Sequence[Params] | None,
        lora_request: Any,
        priority: Sequence[int] | None,
        add_special_tokens: bool,
    ) -> list[str]:
        """Check all prompts, then submit all; if anything goes wrong, nothing of them is left in the engine."""
        if params is None:
            params = self.get_default_sampling_params()
        each: list[Any] = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        _one_each(each, prompts, "sampling_params")
        _one_each(priority, prompts, "priority")
        ranks = [0] * len(prompts) if priority is None else [checked_priority(p) for p in priority]
        drafts = self.llm_engine.inputs.drafts(
            prompts, each, lora_request=lora_request, add_special_tokens=add_special_tokens
        )
        ids: list[str] = []
        try:
            for i, draft in enumerate(drafts):
                if isinstance(draft.params, SamplingParams):
                    draft.params.output_kind = RequestOutputKind.FINAL_ONLY
                ids.append(str(next(self._numbers)))
                self.llm_engine.add(draft, ids[-1], ranks[i])
        except BaseException:
            self._abort(ids)
            raise
        return ids

    def _wait(self, ids: Sequence[str], use_tqdm: UseTqdm, interrupts: Interrupts) -> list[Output]:
        """Step until all of `ids` have ended. Others that end meanwhile are kept for those who ask for them."""
        engine, waiting = self.llm_engine, {i for i in ids if i not in self._done}
        bar = Progress(use_tqdm, len(ids))
        try:
            for i in ids:
                if i in self._done:
                    bar.update(self._done[i])
            while waiting:
                interrupts.check()
                if not engine.has_work:
                    raise EngineError(f"the engine has no work left, but {len(waiting)} requests have no result")
                for output in engine.step():
                    self._done[output.request_id] = output
                    if output.request_id in waiting:
                        waiting.discard(output.request_id)
                        bar.update(output)
            if not engine.has_unfinished_requests():
                engine.drain()  # tokens computed in vain, after a stop string
        except BaseException:
            self._abort(ids)
            raise
        finally:
            bar.close()
        outputs = [self._done.pop(i) for i in ids]
        for output in outputs:
            if (failed := error_of(output)) is not None:
                logger.error("request %s failed: %s", output.request_id, failed)
        return outputs

    def _abort(self, ids: Sequence[str]) -> None:
        """Take requests out of the engine; the error that led here matters more than any that comes of it."""
        try:
            self.llm_engine.abort_request(ids)
            if not self.llm_engine.has_unfinished_requests():
                self.llm_engine.drain()
        except Exception as e:
            logger.warning("aborting %d requests failed: %s: %s", len(ids), type(e).__name__, e)
        for i in ids:
            self._done.pop(i, None)


_NOT_HERE = {  # methods of vLLM's LLM
    "reward": "use encode(prompts, pooling_task='token_classify')",
    **dict.fromkeys(("sleep", "wake_up"), "sleep mode is not there yet; `close` releases the memory"),
    **dict.fromkeys(("start_profile", "stop_profile"), "put torch.profiler.profile() around the call"),
    **dict.fromkeys(("collective_rpc", "apply_model"), "workers take no calls of the user's"),
    "set_tokenizer": "give tokenizer= when the LLM is made",
    "reset_mm_cache": "models are text-only for now",
}


def _texts(outputs: Sequence[Output]) -> list[RequestOutput]:
    return [output for output in outputs if isinstance(output, RequestOutput)]


def _vectors(outputs: Sequence[Output]) -> list[PoolingRequestOutput[PoolingOutput]]:
    """Raises EngineError where one of them has none."""
    found = [output for output in outputs if isinstance(output, PoolingRequestOutput)]
    for output in found:
        if output.error is not None:
            raise EngineError(f"request {output.request_id!r}: {output.error}")
    return found


Kind = TypeVar("Kind", bound=PoolingRequestOutput[Any])


def _as(kind: type[Kind], output: PoolingRequestOutput[Any], outputs: Any) -> Kind:
    cached, metrics = output.num_cached_tokens, output.metrics
    return kind(output.request_id, outputs, output.prompt_token_ids, output.finished, cached, metrics)


def _pooling_kwargs(given: Any, truncate: int | None, kwargs: Mapping[str, Any] | None) -> PoolingParams:
    """A copy of the parameters with what was said beside them. Errors: ClientError."""
    if not isinstance(given, PoolingParams):
        text = f"pooling_params must be PoolingParams, got {type(given).__name__}"
        raise ClientError(text, "pooling_params", given)
    params = given.clone()
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ClientError(f"tokenization_kwargs must be a dict, got {kwargs!r}", "tokenization_kwargs", kwargs)
    for name, value in {"truncate_prompt_tokens": truncate, **(kwargs or {})}.items():
        if name not in ("truncate_prompt_tokens", "truncation_side", "add_special_tokens"):
            text = f"tokenization_kwargs: {name!r} is not supported; for lengths use truncate_prompt_tokens"
            raise ClientError(text, "tokenization_kwargs", name)
        if name != "add_special_tokens" and value is not None:
            setattr(params, name, value)
    return params


def _listed(prompts: Any) -> list[Any]:
    """A list of prompts; one prompt alone (a list of ints is one) becomes a list of one."""
    if isinstance(prompts, str | bytes | Mapping) or hasattr(prompts, "tolist") or not hasattr(prompts, "__iter__"):
        return [prompts]
    items = list(prompts)
    return [items] if items and hasattr(items[0], "__index__") else items


def _one_each(values: Any, prompts: Sequence[Any], name: str) -> None:
    if values is not None and not isinstance(values, Sequence):
        raise ClientError(f"{name} must be a list with one entry for each prompt, got {values!r}", name, values)
    if values is not None and len(values) != len(prompts):
        text = f"{name} has {len(values)} entries for {len(prompts)} prompts: give one for each"
        raise ClientError(text, name, len(values))


def _no_media(kwargs: Mapping[str, Any] | None) -> None:
    if kwargs:
        raise ClientError("mm_processor_kwargs is not supported yet: leave it out", "mm_processor_kwargs")


def _add_special_tokens(kwargs: Mapping[str, Any] | None, default: bool = True) -> bool:
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ClientError(f"tokenization_kwargs must be a dict, got {kwargs!r}", "tokenization_kwargs", kwargs)
    for name in kwargs or ():
        if name != "add_special_tokens":
            text = (
                f"tokenization_kwargs: {name!r} is not supported; for lengths use SamplingParams.truncate_prompt_tokens"
            )
            raise ClientError(text, "tokenization_kwargs", name)
    return bool((kwargs or {}).get("add_special_tokens", default))


def _beams(output: RequestOutput) -> BeamSearchOutput:
    prompt = output.prompt_token_ids
    return BeamSearchOutput(
        [
            BeamSearchSequence(
                tokens=[*prompt, *o.token_ids],
                cum_logprob=o.cumulative_logprob or 0.0,
                text=o.text,
                finish_reason=o.finish_reason,
                stop_reason=o.stop_reason,
            )
            for o in output.outputs
        ]
    )
