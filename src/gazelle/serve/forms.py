"""The two forms of OpenAI's API: chat completions and completions. What they share is in `Form`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gazelle.serve.engine import Piece, Token
from gazelle.serve.prompts import (
    Job, ServedModel, chat_ids, chat_messages, completion_ids, prompt_count, sampling_of,
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
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, request: ChatRequest | CompletionRequest, model: ServedModel) -> None:
        self._request, self._tokenizer = request, model.tokenizer
        self.id, self.created, self.model = "", now(), model.name
        self.places = prompt_count(request)
        self.stream = bool(request.stream)
        self.with_usage = request.with_usage

    @abstractmethod
    def jobs(self, model: ServedModel, settings: Settings) -> list[Job]:
        """The answers to be written. Takes its time; raises `ApiError` and `UserError`."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first piece."""

    @abstractmethod
    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, index: int, choice: "Choice", piece: Piece | None) -> dict[str, Any]:
        """A piece of one; None for the end, which is said alone."""

    def chunks(self, index: int, choice: "Choice", piece: Piece) -> Iterable[dict[str, Any]]:
        """What a stream says when a piece comes."""
        if piece.text or piece.tokens:
            yield self._chunk([self.delta(index, choice, piece) | {"finish_reason": None}])
        if piece.finish:
            yield self._chunk([self.delta(index, choice, None) | {"finish_reason": piece.finish}])

    def whole(self, choices: Sequence["Choice"]) -> dict[str, Any]:
        """The answer of a request without a stream."""
        told = [self.choice(index, choice) | {"finish_reason": choice.finish} for index, choice in enumerate(choices)]
        return self._head(self.object) | {"choices": told, "usage": self._usage(choices)}

    def usage_chunk(self, choices: Sequence["Choice"]) -> dict[str, Any]:
        """The last chunk of a stream, if it was asked for."""
        return self._head(self.chunk_object) | {"choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: Sequence["Choice"]) -> dict[str, int]:
        # A prompt counts once, however many answers it gets.
        prompts = sum(len(choice.job.ids) for choice in choices[:: self._request.n or 1])
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

    def jobs(self, model: ServedModel, settings: Settings) -> list[Job]:
        ids = chat_ids(chat_messages(self._request, model, settings), model)
        return [Job(ids, sampling_of(self._request, len(ids), number, model, settings))
                for number in range(self._request.n or 1)]

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                             "finish_reason": None}])

    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.tokens)}

    def delta(self, index: int, choice: "Choice", piece: Piece | None) -> dict[str, Any]:
        said = {"content": piece.text} if piece else {}
        return {"index": index, "delta": said, "logprobs": self._logprobs(piece.tokens) if piece else None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        told = self._request.top_logprobs or 0
        return {"content": [self._logprob(token.id, token.logprob)
                            | {"top_logprobs": [self._logprob(*one) for one in token.top[:told]]} for token in tokens],
                "refusal": None}


class CompletionForm(Form):
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    _request: CompletionRequest

    def jobs(self, model: ServedModel, settings: Settings) -> list[Job]:
        return [Job(ids, sampling_of(self._request, len(ids), number, model, settings))
                for ids in completion_ids(self._request, model) for number in range(self._request.n or 1)]

    def opening(self, index: int) -> None:
        return None

    def choice(self, index: int, choice: "Choice") -> dict[str, Any]:
        return {"index": index, "text": choice.text, "logprobs": self._logprobs(choice.tokens, 0)}

    def delta(self, index: int, choice: "Choice", piece: Piece | None) -> dict[str, Any]:
        offset = len(choice.text) - len(piece.text) if piece else 0
        return {"index": index, "text": piece.text if piece else "",
                "logprobs": self._logprobs(piece.tokens, offset) if piece else None}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        told = self._request.logprobs
        if told is None:
            return None
        texts = [self._token(token.id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:at])) for at in range(len(texts))]
        return {"tokens": texts, "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{self._token(one): logprob for one, logprob in token.top[:told]} for token in tokens]
                if told else None, "text_offset": offsets}
