"""The bodies of requests and answers: OpenAI's fields, and vLLM's beside them.

Owns: names, types, defaults, and how a body's sampling fields become `SamplingParams`. What the values mean is checked
there. Fields that do not exist are let through, as both models of this interface do; those that exist there and are
not implemented here are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from quire.types.errors import ClientError
from quire.types.params import RequestOutputKind, SamplingParams, StructuredOutputsParams

Item = TypeVar("Item")
# A list that is wrong has one error: a million of them would take seconds to find and to write down.
Items = Annotated[list[Item], Field(fail_fast=True)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
RequestId = Annotated[str, Field(max_length=256, pattern="^[ -~]*$")]  # it goes into a header
MAX_SEQUENCES = 2048  # that one body may ask for: the prompts, times n
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of one message; and how many tools a conversation may have
MAX_BIASES = 1024
MAX_STOPS = 256  # each is looked for after each token
Count = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


# Fields of this interface that would change the answer and that are not implemented: what may be given all the same,
# beside None, since it asks for nothing.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "prompt_embeds": ([],),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_weight_versions": (False,),
    "truncation_side": ("left",),
    "watermarking": (False,),
    "web_search_options": (),
}
INSTEAD = {"functions": "give tools", "function_call": "give tool_choice"}


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchema(Body):
    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """Exactly one of the first five."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(cast(dict[Any, Any], biases)) > MAX_BIASES:
        raise ValueError(f"may name at most {MAX_BIASES} tokens")
    return biases  # pyright: ignore[reportUnknownVariableType]


class Sampling(Body):
    """The sampling fields of every body that asks for text. None: the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Items[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    allowed_token_ids: Items[TokenId] | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None
    bad_words: Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    prompt_logprobs: Count | None = None
    logprob_token_ids: Items[TokenId] | None = None
    stream_interval: Count | None = None
    thinking_token_budget: Count | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    vllm_xargs: dict[str, Any] | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    priority: Int64 = 0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = False
    user: str | None = None

    def params(self, defaults: Mapping[str, Any], logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """Raises ClientError."""
        for name, value in (self.model_extra or {}).items():
            if name in NOT_YET and value is not None and value not in NOT_YET[name]:
                raise ClientError(f"{name} is not supported: {INSTEAD.get(name, 'leave it out')}", name)
        if self.use_beam_search:
            raise ClientError("beam search is offered offline only (LLM.beam_search); leave it out", "use_beam_search")
        if self.stream_options is not None and not self.stream:
            raise ClientError("stream_options is only allowed with stream=true", "stream_options")
        fields = {name: value for name in _PASSED if (value := getattr(self, name)) is not None}
        if self.vllm_xargs is not None:
            fields["extra_args"] = self.vllm_xargs
        if logprobs is not None:
            fields["logprobs"] = logprobs
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        constraint = self._constraint()
        params = SamplingParams(
            **{**defaults, **fields}, max_tokens=max_tokens, output_kind=kind, structured_outputs=constraint
        )
        return params

    def _constraint(self) -> StructuredOutputsParams | None:
        given, format = self.structured_outputs, self.response_format
        if format is not None and format.type != "text":
            if given is not None:
                raise ClientError("give response_format or structured_outputs, not both", "response_format")
            if format.type == "json_object":
                return StructuredOutputsParams(json_object=True)
            if format.json_schema is None or format.json_schema.json_schema is None:
                raise ClientError("response_format of type json_schema needs json_schema.schema", "response_format")
            return StructuredOutputsParams(json=format.json_schema.json_schema)
        if given is None:
            return None
        return StructuredOutputsParams(**given.model_dump(include=set(type(given).model_fields), by_alias=True))


_PASSED = (
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "allowed_token_ids",
    "logit_bias", "bad_words", "prompt_logprobs", "logprob_token_ids", "stream_interval", "thinking_token_budget",
)  # fmt: skip


class CompletionRequest(Sampling):
    model: str | None = None
    prompt: (
        str
        | Annotated[Items[str], Field(max_length=MAX_SEQUENCES)]
        | Items[TokenId]
        | Annotated[Items[Items[TokenId]], Field(max_length=MAX_SEQUENCES)]
    )
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Count | None = None
    suffix: str | None = None
    best_of: Count | None = None
    add_special_tokens: bool = True
    request_id: RequestId | None = None


class FunctionDefinition(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class Message(Body):
    """A message of a conversation: a role, and content as text or as parts."""

    role: str
    content: str | Annotated[Items[dict[str, Any] | str], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[Items[dict[str, Any]], Field(max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None


class Conversation(Body):
    """What becomes a prompt by the chat template."""

    messages: Items[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Annotated[Items[Tool], Field(max_length=MAX_PARTS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Sampling, Conversation):
    model: str | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    echo: bool | None = False
    request_id: RequestId | None = None


class TokenizeRequest(Body):
    """Text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_PARTS)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Items[TokenId]


class GenerateRequest(Sampling):
    """The plain interface: vLLM's demo server."""

    prompt: str


# -- answers ---------------------------------------------------------------------------------------------------------


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorInfo


class PromptTokensDetails(BaseModel):
    cached_tokens: int | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob] | None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    role: str
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "quire"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    permission: list[dict[str, Any]] = []


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class GenerateResponse(BaseModel):
    text: list[str]


class Health(BaseModel):
    status: str


class Load(BaseModel):
    server_load: int


class Version(BaseModel):
    version: str


class Profile(BaseModel):
    path: str
