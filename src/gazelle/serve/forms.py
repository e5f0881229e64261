"""The two forms of OpenAI's API: chat completions and completions. What they share is in `Form`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gazelle.generate.request import Event
from gazelle.generate.sample import Logprob
from gazelle.serve.guarding import Guard, check_tellable
from gazelle.serve.prompts import (
    Job,
    ServedModel,
    chat_ids,
    chat_messages,
    completion_ids,
    prompt_count,
    sampling_of,
)
from gazelle.serve.schema import ChatRequest, CompletionRequest
from gazelle.serve.service import now
from gazelle.serve.settings import Settings

if TYPE_CHECKING:
    from gazelle.serve.answers import Choice


class Form(ABC):
    """How one request is read, and how its answer is written.

    Attributes:
        id: of the answer, once it has one.
        places: answers in all.
        each: answers to each prompt, which follow one another.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, request: ChatRequest | CompletionRequest, model: ServedModel) -> None:
        self._request, self._tokenizer = request, model.tokenizer
        self.id, self.created, self.model = "", now(), model.name
        self.places, self.each = prompt_count(request), request.n or 1
        self.stream = bool(request.stream)
        self.with_usage = request.with_usage

    @abstractmethod
    def jobs(self, model: ServedModel, settings: Settings, guard: Guard | None) -> list[Job]:
        """The answers to be written, once the guard has seen the question. Takes its time.

        Raises:
            ApiError: the request cannot be answered.
            UserError: the same, found below.
        """

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token."""

    @abstractmethod
    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, index: int, choice: "Choice", event: Event | None) -> dict[str, Any]:
        """What an event adds to one; None for the end, which is said alone."""

    def chunks(self, index: int, choice: "Choice", event: Event) -> Iterable[dict[str, Any]]:
        """What a stream says at an event."""
        if event.text or event.logprobs:
            yield self._chunk([self.delta(index, choice, event) | {"finish_reason": None}])
        if event.finish_reason:
            yield self._chunk([self.delta(index, choice, None) | {"finish_reason": event.finish_reason}])

    def whole(self, choices: Sequence["Choice"]) -> dict[str, Any]:
        """The answer of a request without a stream."""
        told = [self.choice(index, choice) | {"finish_reason": choice.finish} for index, choice in enumerate(choices)]
        return self._head(self.object) | {"choices": told, "usage": self._usage(choices)}

    def usage_chunk(self, choices: Sequence["Choice"]) -> dict[str, Any]:
        """The last chunk of a stream, if it was asked for."""
        return self._head(self.chunk_object) | {"choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: Sequence["Choice"]) -> dict[str, int]:
        # A prompt counts once, however many answers it gets.
        prompts = sum(len(choice.job.ids) for choice in choices[:: self.each])
        answers = sum(len(choice.ids) for choice in choices)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.chunk_object) | {"choices": choices} | ({"usage": None} if self.with_usage else {})

    def _token(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # Part of a character is no text: clients that put bytes together get none.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _request: ChatRequest

    def jobs(self, model: ServedModel, settings: Settings, guard: Guard | None) -> list[Job]:
        check_tellable(guard, self._request.logprobs)
        ids = chat_ids(chat_messages(self._request, model, settings, guard), model)
        return [Job(ids, sampling_of(self._request, len(ids), number, model, settings))
                for number in range(self._request.n or 1)]

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                             "finish_reason": None}])

    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs)}

    def delta(self, index: int, choice: "Choice", event: Event | None) -> dict[str, Any]:
        said = {"content": event.text} if event else {}
        return {"index": index, "delta": said, "logprobs": self._logprobs(event.logprobs) if event else None}

    def _logprobs(self, tokens: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        told = self._request.top_logprobs or 0
        return {"content": [self._logprob(token.token, token.logprob)
                            | {"top_logprobs": [self._logprob(*one) for one in token.top[:told]]} for token in tokens],
                "refusal": None}


class CompletionForm(Form):
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    _request: CompletionRequest

    def jobs(self, model: ServedModel, settings: Settings, guard: Guard | None) -> list[Job]:
        check_tellable(guard, self._request.logprobs)
        return [Job(ids, sampling_of(self._request, len(ids), number, model, settings))
                for ids in completion_ids(self._request, model, guard) for number in range(self._request.n or 1)]

    def opening(self, index: int) -> None:
        return None

    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        return {"index": index, "text": choice.text, "logprobs": self._logprobs(choice.logprobs, 0)}

    def delta(self, index: int, choice: "Choice", event: Event | None) -> dict[str, Any]:
        offset = len(choice.text) - len(event.text) if event else 0
        return {"index": index, "text": event.text if event else "",
                "logprobs": self._logprobs(event.logprobs, offset) if event else None}

    def _logprobs(self, tokens: Sequence[Logprob], offset: int) -> dict[str, Any] | None:
        told = self._request.logprobs
        if told is None:
            return None
        texts = [self._token(token.token) for token in tokens]
        offsets = [offset + sum(map(len, texts[:at])) for at in range(len(texts))]
        return {"tokens": texts, "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{self._token(one): logprob for one, logprob in token.top[:told]} for token in tokens]
                if told else None, "text_offset": offsets}
