"""Requests and answers of OpenAI's API, as far as they are served. FastAPI makes the OpenAPI file of them.

Fields of the API that change the answer and are not served are known by name, so that they are refused with a reason
and not left out in silence; fields that change nothing here are taken.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gazelle.serve.errors import refused

_FIELDS = 64


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    # Checking holds up every other request, so it ends at the first mistake: a megabyte may hold 500,000 of them.
    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, content: Any) -> Any:
        if isinstance(content, dict) and len(content) > _FIELDS:
            raise ValueError(f"an object has at most {_FIELDS} fields")
        return content


def _whole_characters(content: Any) -> Any:
    """JSON may spell half a surrogate pair, which is no character, and which nothing below could encode."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair is no character") from error
    except RecursionError as error:
        raise ValueError("lists or objects lie too deep in one another") from error
    return content


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TextPart(_Body):
    """A piece of a message; pieces of other types are refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class Message(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None  # clients send an answer back with all its fields


class JsonSchema(_Body):
    """A schema that an answer has to fit."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """Text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Body):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(_Body):
    _whole = model_validator(mode="before")(_whole_characters)

    model: Annotated[str, Field(max_length=256)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1 << 20, description="Not OpenAI's; 0 for all tokens.")] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10, description="Not OpenAI's.")] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Any = None
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def _unserved(self) -> dict[str, Any]:
        """Fields that would change the answer and are not served, with the values that ask for nothing."""
        return {"logit_bias": (None, {})}

    def check_served(self) -> None:
        """Raise `ApiError` for a field that is not served."""
        for name, harmless in self._unserved().items():
            if getattr(self, name) not in harmless:
                raise refused(f"This server does not do {name!r}; leave it out.", name, "unsupported_parameter")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0)] = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    def _unserved(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), (None,))
        return super()._unserved() | nothing | {
            "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
            "function_call": (None, "none", "auto"), "modalities": (None, ["text"])}


_PROMPTS = 1024
_Texts = Annotated[list[str], Field(fail_fast=True, max_length=_PROMPTS)]
_Ids = Annotated[list[int], Field(fail_fast=True)]


class CompletionRequest(_Request):
    """Body of /v1/completions."""

    prompt: Annotated[str | _Texts | _Ids | Annotated[list[_Ids], Field(fail_fast=True, max_length=_PROMPTS)],
                      Field(union_mode="left_to_right")]
    logprobs: Annotated[int | None, Field(ge=0)] = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def _unserved(self) -> dict[str, Any]:
        return super()._unserved() | {"echo": (None, False), "suffix": (None, ""), "best_of": (None, 1, self.n)}


class Feedback(_Body):
    """Body of /v1/feedback: what a reader thought of an answer."""

    _whole = model_validator(mode="before")(_whole_characters)

    id: Annotated[str, Field(max_length=64, description="Of the answer.")]
    rating: Literal["good", "bad"]


class FeedbackTaken(_Answer):
    """The answer to it."""

    object: Literal["feedback"] = "feedback"
    id: str
    rating: Literal["good", "bad"]


class Usage(_Answer):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(_Answer):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(_Answer):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length", "content_filter"]


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(_Answer):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class CompletionLogprobs(_Answer):
    """Of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(_Answer):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Model(_Answer):
    """A name that requests may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gazelle"
    root: str | None = None
    parent: str | None = None
    max_model_len: int


class ModelList(_Answer):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Answer):
    """Answer of /health."""

    status: Literal["ok", "draining", "failed"]


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Answer to a request that is refused."""

    error: ErrorDetail
