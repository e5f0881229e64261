"""From a request to the ids that the model reads and the options it answers with. It runs in threads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from gazelle.data.profile import Drift
from gazelle.generate.options import Sampling
from gazelle.serve.errors import refused
from gazelle.serve.guarding import Guard
from gazelle.serve.schema import ChatRequest, CompletionRequest, Message, ResponseFormat
from gazelle.serve.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """One name that requests may ask for.

    Attributes:
        adapter: what the worker calls it.
        tokenizer: with the chat template that its training used.
        context: tokens of prompt and answer together.
        drift: against its training data, where a profile of that is known.
    """

    name: str
    adapter: str | None
    tokenizer: Any
    context: int
    created: int
    parent: str | None = None
    drift: Drift | None = None
    control: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        special = {*self.tokenizer.all_special_tokens, *(
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)}
        object.__setattr__(self, "control", frozenset(filter(None, special)))


@dataclass(frozen=True)
class Job:
    """One answer to be written: ids of its prompt, and how."""

    ids: list[int]
    sampling: Sampling


def chat_messages(request: ChatRequest, model: ServedModel, settings: Settings,
                  guard: Guard | None = None) -> list[dict[str, Any]]:
    """The conversation as a chat template takes it, with what the guard masks masked.

    Raises:
        ApiError: a role or kind of content that is not served, or text with the model's control tokens in it, which
            would end the message and begin another in somebody else's name; or text that the guard blocks.
    """
    if len(request.messages) > settings.limits.messages:
        raise refused(f"The conversation has {len(request.messages)} messages; at most {settings.limits.messages}.",
                      "messages")
    messages = []
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        if message.role in ("tool", "function") or message.tool_calls or message.function_call:
            raise refused("This server does not do tools.", where, "unsupported_parameter")
        if message.audio is not None:
            raise refused("This server takes text alone.", where, "unsupported_parameter")
        text = _text(message, f"{where}.content")
        if found := next((token for token in model.control if token in text), None):
            raise refused(f"The text holds {found!r}, with which the model tells messages apart; take it out.",
                          f"{where}.content", "control_token")
        if guard is not None:
            text = guard.asked(text, f"{where}.content")
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return messages


def chat_ids(messages: list[dict[str, Any]], model: ServedModel) -> list[int]:
    """The ids of a conversation, rendered in transformers' sandbox as training renders it.

    Raises:
        ApiError: the model has no chat template, or it refuses the conversation.
    """
    if not model.tokenizer.chat_template:
        raise refused("The model has no chat template; use /v1/completions.", "model", "no_chat_template")
    try:
        return list(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                                        return_dict=True)["input_ids"])
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise refused(f"The model's chat template refuses the conversation: {error}.", "messages") from error


def prompt_count(request: ChatRequest | CompletionRequest) -> int:
    """How many answers a request asks for."""
    prompts = 1
    if isinstance(request, CompletionRequest) and isinstance(request.prompt, list):
        prompts = len(request.prompt) if request.prompt and not isinstance(request.prompt[0], int) else 1
    return prompts * (request.n or 1)


def completion_ids(request: CompletionRequest, model: ServedModel, guard: Guard | None = None) -> list[list[int]]:
    """The ids of each prompt of a completion.

    Raises:
        ApiError: an empty prompt, an id that is no token, or text that the guard blocks.
    """
    prompt = request.prompt
    many: Sequence[Any] = [prompt]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        many = prompt
    rows = []
    for one in many:
        if isinstance(one, str):
            ids = _text_ids(one if guard is None else guard.asked(one, "prompt"), model)
        else:
            ids = list(one)
            if any(not 0 <= token < len(model.tokenizer) for token in ids):
                raise refused("A token id is not in the vocabulary.", "prompt")
            text = model.tokenizer.decode(ids) if guard is not None else ""
            if guard is not None and (masked := guard.asked(text, "prompt")) != text:
                ids = _text_ids(masked, model)
        if not ids:
            raise refused("A prompt is empty.", "prompt")
        rows.append(ids)
    return rows


def _text_ids(text: str, model: ServedModel) -> list[int]:
    ids = list(model.tokenizer(text)["input_ids"])
    bos = model.tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids  # a rendered prompt brings its own


def sampling_of(request: ChatRequest | CompletionRequest, prompt: int, choice: int, model: ServedModel,
                settings: Settings) -> Sampling:
    """How the `choice`-th answer to a prompt of so many tokens is to be written.

    Raises:
        ApiError: an option beyond the server's limits.
    """
    limits = settings.limits
    asked, logprobs = request.max_tokens, None
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or asked
        if request.top_logprobs and not request.logprobs:
            raise refused("top_logprobs needs logprobs: true.", "top_logprobs")
        logprobs = request.top_logprobs or 0 if request.logprobs else None
    else:
        logprobs = request.logprobs
    if (logprobs or 0) > limits.top_logprobs:
        raise refused(f"At most {limits.top_logprobs} likeliest tokens are told.", "logprobs")
    if len(request.stops) > limits.stops:
        raise refused(f"At most {limits.stops} stop strings.", "stop")
    if any(not 0 < len(stop) <= limits.stop_characters for stop in request.stops):
        raise refused(f"A stop string has 1 to {limits.stop_characters} characters.", "stop")
    room = model.context - prompt
    if room < 1 or (asked or 1) > room:
        wanted = f" and {asked:,} for the answer" if asked else ""
        raise refused(f"The model's context is {model.context:,} tokens; the prompt has {prompt:,}{wanted}.",
                      "messages" if isinstance(request, ChatRequest) else "prompt", "context_length_exceeded")
    most = min(room, limits.answer_tokens or room)
    if asked is None and isinstance(request, CompletionRequest):
        asked = min(16, most)  # the API's own default there
    if asked is not None and asked > most:
        raise refused(f"An answer has at most {most:,} tokens here.", "max_tokens")
    temperature = settings.temperature if request.temperature is None else request.temperature
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    schema = _schema(request.response_format, settings) if isinstance(request, ChatRequest) else None
    return Sampling(max_new_tokens=asked or most, temperature=temperature, top_p=request.top_p or 1.0,
                    top_k=request.top_k or 0, repetition_penalty=request.repetition_penalty or 1.0,
                    presence_penalty=request.presence_penalty or 0.0,
                    frequency_penalty=request.frequency_penalty or 0.0, seed=seed, stop=request.stops,
                    schema=schema, logprobs=logprobs)


def _text(message: Message, where: str) -> str:
    if message.content is None:
        raise refused("A message has no content.", where)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for number, part in enumerate(message.content):
        if part.type not in ("text", "input_text") or part.text is None:
            raise refused(f"This server takes text alone, not {part.type!r}.", f"{where}.{number}",
                          "unsupported_parameter")
        texts.append(part.text)
    return "".join(texts)


def _schema(wanted: ResponseFormat | None, settings: Settings) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    schema = wanted.json_schema.schema_ if wanted.json_schema else None
    if schema is None:
        raise refused("response_format has no json_schema.schema.", "response_format")
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (ValueError, RecursionError) as error:
        raise refused("The JSON schema is no JSON.", "response_format") from error
    if size > settings.limits.schema_bytes:
        raise refused(f"The JSON schema is larger than {settings.limits.schema_bytes:,} bytes.", "response_format")
    return schema
