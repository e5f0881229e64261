"""`model.fast_generate`: many prompts at once, with vLLM's names for what goes in and comes out."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling, sampling_of
from gazelle.generate.request import Event, Request
from gazelle.generate.room import room_in_tokens
from gazelle.generate.sample import Logprob
from gazelle.models.generate import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[dict[str, Any]] | dict[str, Any]


@dataclass(frozen=True)
class LoraRequest:
    """An adapter in a folder, to be asked for by `lora_request`; vLLM's own objects are taken as well."""

    lora_name: str
    lora_path: str


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
        index: which of a prompt's answers.
        text: without special tokens, and without the stop string that ended it.
        token_ids: with the token that ended it.
        finish_reason: "stop" or "length".
        logprobs: one for each token, if they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[Logprob] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' log-probabilities, if they were asked for."""
        return None if self.logprobs is None else sum(entry.logprob for entry in self.logprobs)


@dataclass
class RequestOutput:
    """The answers to one prompt; as text it is the first of them.

    Attributes:
        prompt: as text, if it came as one.
        prompt_token_ids: its ids.
        outputs: the answers, as many as `n`.
        num_cached_tokens: tokens of the prompt that another one's cache had already.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer."""
        return self.outputs[0].text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """What came for one of the prompts: text, tokens, and at its end the reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


def fast_generate(model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: Prompt | Sequence[Prompt],
                  sampling_params: Any = None, *, lora_request: Any = None, stream: bool = False, n: int | None = None,
                  max_running: int = 16, max_context: int | None = None, share_prefixes: bool = True,
                  use_tqdm: Any = None, **options: Any) -> "list[RequestOutput] | Iterator[Piece]":  # noqa: ARG001
    """Answer prompts together: while some are being answered others join in, and beginnings are computed once.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: one or a list of texts, conversations (lists of messages), lists of ids, or vLLM's dicts.
        sampling_params: a `Sampling`, vLLM's `SamplingParams`, a dict, or a list with one for each prompt.
        lora_request: None for the model as it stands; an adapter's name, its folder, what `load_lora` or vLLM gives, or
            "__base__" for the model without one; or a list with one for each prompt.
        stream: give pieces as they come instead.
        n: answers to each prompt.
        max_running: prompts answered at a time.
        max_context: tokens that prompt and answer may have; None for the model's limit.
        share_prefixes: whether beginnings that prompts have in common are computed once.
        use_tqdm: taken because scripts pass it.
        **options: fields of `Sampling`, such as max_new_tokens or temperature, over those of `sampling_params`.

    Returns:
        One `RequestOutput` for each prompt, in their order, or an iterator of `Piece` whose index is the prompt's.

    Raises:
        UserError: what cannot be done is said before anything is computed.
    """
    items = _listed(prompts)
    given = sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params] * len(items)
    wanted = lora_request if isinstance(lora_request, list | tuple) else [lora_request] * len(items)
    for name, values in (("sampling_params", given), ("lora_request", wanted)):
        if len(values) != len(items):
            raise OptionError("one for each prompt is needed", where=name, found=len(values),
                              expected=f"{len(items)}, or a single one for all", fix=f"change {name}")
    answers = [n if n is not None else getattr(params, "n", None) or 1 for params in given]
    if not all(isinstance(number, int) and 1 <= number <= 128 for number in answers):
        raise OptionError("a value out of range", where="n", found=n, expected="1 to 128", fix="change n")
    sampling = [sampling_of(params, **options) for params in given]
    if stream and max(answers, default=1) > 1:
        raise OptionError("one answer at a time can be streamed", where="n", found=n, expected="1", fix="leave n out")
    folders, names = _adapters(model, wanted)
    ids = [_ids(tokenizer, item) for item in items]
    batcher = Batcher(model, tokenizer, adapters=folders, max_running=max_running, share_prefixes=share_prefixes,
                      max_context=max_context, cache_tokens=_room(model, ids, sampling, answers, max_running))
    try:
        requests = [[batcher.submit(row, _seeded(how, number), name) for number in range(count)]
                    for row, how, name, count in zip(ids, sampling, names, answers, strict=True)]
    except BaseException:
        batcher.close()
        raise
    if stream:
        pieces = _pieces(batcher, [few[0] for few in requests])
        weakref.finalize(pieces, batcher.close)  # a generator that nobody began does not close anything
        return pieces
    logprobs: dict[Request, list[Logprob]] = {}
    with batcher:
        for event in _events(batcher):
            logprobs.setdefault(event.request, []).extend(event.logprobs)
    return [RequestOutput(item if isinstance(item, str) else None, row,
                          [_output(number, request, logprobs) for number, request in enumerate(few)], few[0].reused)
            for item, row, few in zip(items, ids, requests, strict=True)]


def _room(model: Any, ids: list[list[int]], sampling: list[Sampling], answers: list[int], running: int) -> int | None:
    """Tokens of cache for the `running` longest, if their lengths are known and half of the free memory takes them."""
    if any(how.max_new_tokens is None for how in sampling) or not ids:
        return None
    needs = sorted((len(row) + (how.max_new_tokens or 0) + 32 for row, how, count
                    in zip(ids, sampling, answers, strict=True) for _ in range(count)), reverse=True)
    needed = sum(needs[:running])
    return needed if needed <= room_in_tokens(unwrap(model)) else None


def _events(batcher: Batcher) -> Iterator[Event]:
    while batcher.busy:
        for event in batcher.step():
            if event.error is not None:
                raise event.error
            yield event


def _pieces(batcher: Batcher, requests: list[Request]) -> Iterator[Piece]:
    numbers = {request: number for number, request in enumerate(requests)}
    with batcher:
        for event in _events(batcher):
            yield Piece(numbers[event.request], event.text, event.tokens, event.finish_reason)


def _output(number: int, request: Request, logprobs: dict[Request, list[Logprob]]) -> CompletionOutput:
    asked = request.sampling.logprobs is not None
    return CompletionOutput(number, request.text, list(request.tokens), request.finish_reason,
                            logprobs.get(request, []) if asked else None)


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """Further answers to the same prompt are drawn otherwise."""
    return sampling if sampling.seed is None or number == 0 else replace(sampling, seed=sampling.seed + number)


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | dict):
        return [prompts]
    items = list(prompts)
    single = items and (isinstance(items[0], int) or (isinstance(items[0], dict) and "role" in items[0]))
    return [items] if single else items


def _ids(tokenizer: "PreTrainedTokenizerBase", item: Any) -> list[int]:
    if isinstance(item, dict):
        found = item.get("prompt_token_ids", item.get("prompt"))
        if found is None:
            raise OptionError("a prompt as a dict holds its text or its ids", where="prompts", found=sorted(item),
                              expected="prompt or prompt_token_ids", fix="change the prompt")
        item = found
    item = item.tolist() if hasattr(item, "tolist") else item  # arrays and tensors
    if not isinstance(item, str | Sequence):
        raise OptionError("this is no prompt", where="prompts", found=type(item).__name__,
                          expected="a text, a conversation, a list of ids, or a list of these",
                          fix="change the prompt")
    if not isinstance(item, str) and (not item or not isinstance(item[0], dict)):
        return [int(token) if isinstance(token, Integral) else token for token in item]
    return encode_prompt(tokenizer, cast(Any, item))


def _adapters(model: Any, wanted: Sequence[Any]) -> tuple[dict[str, str | PathLike[str]], list[str | None]]:
    """The folders to read, by name, and what each prompt asks for."""
    own = getattr(model, "peft_config", {})
    folders: dict[str, str | PathLike[str]] = {}
    names: list[str | None] = []
    for item in wanted:
        if item is None:
            names.append(None)
            continue
        path = getattr(item, "lora_path", None) or getattr(item, "path", None)
        name = getattr(item, "lora_name", None) or getattr(item, "name", None) if path else str(item)
        if path is None and name not in own and (isinstance(item, Path) or Path(str(item)).is_dir()):
            path = item
        if path is not None:
            name = str(path)
            folders[name] = path
        names.append(name)
    return folders, names
