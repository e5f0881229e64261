"""Conversations to token ids and labels.

Shape legend: T tokens of a row. `labels[t]` is the id at `t` itself, or -100 where it is not trained; the loss shifts
by one, so the first token of a row, which nothing predicts, is never labelled.
"""

import hashlib
import itertools
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gazelle.base.errors import DataError, ModelError, OptionError, nearest
from gazelle.data.conversation import Conversation
from gazelle.data.spans import Renderer, Span

IGNORED = -100  # the label that cross_entropy skips
_BATCH = 512
_CHECKED_ROWS = 2000
AnswersOf = Callable[[Conversation], list[tuple[int, int]]]  # characters [start, end) that the model is to write


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: T token ids and T labels, kept as 32-bit integers, and where it was read."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    where: str

    def __post_init__(self) -> None:
        for name in ("input_ids", "labels"):  # a list takes some 36 bytes a token
            object.__setattr__(self, name, array("i", getattr(self, name)))


@dataclass(frozen=True)
class Mismatch:
    """An answer whose training tokens differ from what inference would feed: the tokens around the first difference."""

    where: str
    training: list[str]
    inference: list[str]


@dataclass
class Encoded:
    """Examples, and what happened on the way to them.

    Attributes:
        rows: conversations and texts that came in.
        lengths: tokens of each of them before cutting.
        truncated: conversations cut at `max_length`, the dropped ones included.
        dropped: conversations left without a labelled token by that.
        unlabelled: rows without a labelled token at any length: texts of one token, answers merged into the prompt.
        chunked: texts longer than `max_length`, cut into several examples without losing a token.
        boundary_merges: tokens that hold both the end of a prompt and the start of an answer; they are not labelled.
        unclosed: answers that no special token ends, so that the model does not learn to stop.
        incomplete: conversations with an answer of whose content the chat template leaves something out.
        checked, mismatched, mismatch: answers compared with inference, how many differ, and the first that does.
        row_keys, prompt_keys: digests of each row, and of all before its last answer, to find duplicates by.
        sample: the first example as pieces of text, each with whether it is labelled.
        unused: columns of the source that its format does not use.
    """

    examples: list[Example] = field(default_factory=list)
    max_length: int = 0
    source: str = ""
    format: str = ""
    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    unlabelled: int = 0
    chunked: int = 0
    boundary_merges: int = 0
    unclosed: int = 0
    incomplete: int = 0
    checked: int = 0
    mismatched: int = 0
    mismatch: Mismatch | None = None
    row_keys: list[bytes] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    sample: list[tuple[str, bool]] = field(default_factory=list)
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.examples and not self.rows:  # rows that came tokenised
            self.rows = len(self.examples)
            self.lengths = [len(example.input_ids) for example in self.examples]
            self.row_keys = self.prompt_keys = [_key(str(example.input_ids)) for example in self.examples]


def encode(conversations: Sequence[Conversation], tokenizer: Any, *, max_length: int,
           train_on: str = "responses", source: str = "", format: str = "",  # noqa: A002
           unused: tuple[str, ...] = (), answers: AnswersOf | None = None) -> Encoded:
    """Render, tokenise and label `conversations`.

    Conversations are cut on the right at `max_length` tokens. Texts get the tokenizer's own first token, if it adds
    one, and an EOS token, are labelled throughout, and are cut into equal pieces of at most `max_length`.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an EOS token, and a chat template unless all rows are texts.
        train_on: "responses" labels what the assistant says with its end-of-turn token, "all" labels everything.
        source, format, unused: where the rows come from, and their columns that are not used, for the report.
        answers: of a text, the characters that are labelled; left out, all are.

    Raises:
        OptionError: `max_length` below 2, or an unknown `train_on`.
        ModelError: a tokenizer that is slow or lacks an EOS token or a chat template.
        DataError: a conversation the template cannot render, or no labelled token anywhere.
    """
    _check(tokenizer, max_length, train_on)
    encoded = Encoded([], max_length, source, format, rows=len(conversations), unused=unused)
    step = -(-len(conversations) // _CHECKED_ROWS) or 1
    renderer = Renderer(tokenizer) if any(row.text is None for row in conversations) else None
    needed: list[int] = []
    for first in range(0, len(conversations), _BATCH):
        batch = conversations[first : first + _BATCH]
        chats = [row for row in batch if row.text is None]
        rendered = iter(_chats(chats, renderer, tokenizer, encoded, train_on) if renderer and chats else ())
        texts = iter(_texts([row for row in batch if row.text is not None], tokenizer, answers))
        compare: list[tuple[str, list[int], str]] = []
        for number, row in enumerate(batch, first):
            if row.text is None:
                ids, labels, spans = next(rendered)
                if number % step == 0:
                    compare += [(span.prompt, ids, row.where) for span in spans]
                needed += _keep_chat(ids, labels, row.where, encoded)
            else:
                _keep_text(*next(texts), row.where, encoded)
            encoded.row_keys.append(_key(*(f"{turn.role}: {turn.content} {dict(turn.extra)}" for turn in row.turns),
                                         str(row.tools or ""), row.text or ""))
            encoded.prompt_keys.append(_key(plain) if (plain := plain_text(prompt_text(row))) else encoded.row_keys[-1])
        _compare(compare, tokenizer, encoded)
    if not encoded.examples:
        raise DataError("no row has a labelled token within max_length", where=conversations[0].where if conversations
                        else "data", found=f"max_length={max_length}; the longest of {len(conversations)} rows has "
                        f"{max(encoded.lengths, default=0)} tokens", expected="an answer that begins before the cut",
                        fix=f"set max_length to at least {min(needed)}" if needed else
                        "add rows with more text, or choose another template with chat_template=")
    encoded.sample = _sample(encoded.examples[0], tokenizer)
    return encoded


def prompt_text(row: Conversation) -> str:
    """All a row holds before its last answer, without the system prompt; of a text row, all of it."""
    if row.text is not None:
        return row.text
    last = max((number for number, turn in enumerate(row.turns) if turn.role == "assistant"), default=len(row.turns))
    return "\n".join(turn.content for turn in row.turns[:last] if turn.role != "system")


def _check(tokenizer: Any, max_length: int, train_on: str) -> None:
    if max_length < 2:
        raise OptionError("max_length is too small", where="max_length", found=max_length,
                          expected="at least 2 tokens", fix="leave it out, or set it to 512 or more")
    if train_on not in ("responses", "all"):
        raise OptionError(f"unknown train_on {train_on!r}", where="train_on", found=train_on,
                          expected="responses or all", fix=nearest(train_on, ["responses", "all"]))
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer cannot say which characters a token covers", where="tokenizer",
                         found=type(tokenizer).__name__, expected="a fast tokenizer (tokenizer.json)",
                         fix="load it with AutoTokenizer.from_pretrained(..., use_fast=True)")
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so nothing would teach the model to stop", where="tokenizer",
                         found="eos_token is None", expected="a token that ends an answer",
                         fix='name it, for example tokenizer.eos_token = "<|im_end|>"')


def _chats(rows: list[Conversation], renderer: Renderer, tokenizer: Any, encoded: Encoded,
           train_on: str) -> Iterator[tuple[list[int], list[int], list[Span]]]:
    """Ids, labels and spans of each conversation."""
    rendered = [renderer.render(row) for row in rows]
    tokens = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True,
                       return_attention_mask=False, verbose=False)
    greedy = _greedy(tokenizer)
    for (_, spans), ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        array = np.array(ids)
        starts, ends = _places(array, offsets, greedy)
        trained = np.full(len(ids), train_on == "all")
        for span in spans:
            trained |= (starts >= span.start) & (starts < span.end)
            encoded.boundary_merges += int(((starts < span.start) & (ends > span.start)).sum())
            encoded.unclosed += not span.closed
        encoded.incomplete += not all(span.whole for span in spans)
        trained[:1] = False
        yield ids, np.where(trained, array, IGNORED).tolist(), spans


def _greedy(tokenizer: Any) -> list[int]:
    """Special tokens that swallow the white space after them (Phi-3), which they do not report in their offsets."""
    return [number for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip]


def _places(ids: np.ndarray, offsets: list[tuple[int, int]], greedy: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens start and end in their text."""
    starts, ends = np.array(offsets).reshape(-1, 2).T
    # Byte-level tokenizers leave a token's leading space out of its offsets: it starts where the last one ended.
    before = np.concatenate(([0], ends[:-1]))
    after_greedy = np.concatenate(([False], np.isin(ids[:-1], greedy)))
    return np.where(after_greedy, starts, np.minimum(starts, before)), ends


def _keep_chat(ids: list[int], labels: list[int], where: str, encoded: Encoded) -> list[int]:
    """Keep a conversation up to max_length; returns the max_length its first labelled token needs, if it has one."""
    limit = encoded.max_length
    needed = [number for number, label in enumerate(labels, 1) if label != IGNORED][:1]
    encoded.lengths.append(len(ids))
    encoded.truncated += len(ids) > limit
    if not needed:
        encoded.unlabelled += 1
    elif needed[0] > limit:
        encoded.dropped += 1
    else:
        encoded.examples.append(Example(ids[:limit], labels[:limit], where))
    return needed


def _texts(rows: list[Conversation], tokenizer: Any,
           answers: AnswersOf | None) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each text."""
    if not rows:
        return
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts: list[str] = [row.text or "" for row in rows]
    tokens = tokenizer(texts, return_attention_mask=False, return_offsets_mapping=answers is not None, verbose=False)
    greedy = _greedy(tokenizer)
    for number, (row, ids) in enumerate(zip(rows, tokens["input_ids"], strict=True)):
        labels = ids
        if answers is not None:
            starts, ends = _places(np.array(ids), tokens["offset_mapping"][number], greedy)
            trained = np.zeros(len(ids), bool)
            for start, end in answers(row):
                trained |= (starts >= start) & (starts < end)
            if ids[-1:] == [eos] and len(ids) > 1 and ends[-1] == 0:  # one that the tokenizer put there
                trained[-1] = trained[-2]
            labels = np.where(trained, ids, IGNORED).tolist()
        # Texts that scripts render with a chat template bring these tokens along; once is enough.
        if bos is not None and ids[:2] == [bos, bos]:
            ids, labels = ids[1:], labels[1:]
        if not (texts[number].rstrip().endswith(tokenizer.eos_token) or ids[-1:] == [eos]):
            ids, labels = [*ids, eos], [*labels, eos if labels[-1:] != [IGNORED] else IGNORED]
        yield ids, labels


def _keep_text(ids: list[int], labels: list[int], where: str, encoded: Encoded) -> None:
    encoded.lengths.append(len(ids))
    encoded.chunked += len(ids) > encoded.max_length
    encoded.unlabelled += all(label == IGNORED for label in labels[1:])
    # Equal pieces: a short remainder would have next to nothing to be predicted from.
    pieces = -(-len(ids) // encoded.max_length)
    for piece, learnt in zip(np.array_split(ids, pieces), np.array_split(labels, pieces), strict=True):
        if (learnt[1:] != IGNORED).any():  # nothing predicts a token on its own
            encoded.examples.append(Example(piece.tolist(), [IGNORED, *learnt[1:].tolist()], where))


def _compare(answers: list[tuple[str, list[int], str]], tokenizer: Any, encoded: Encoded) -> None:
    """Count the answers whose training ids do not begin with the ids inference would feed for them."""
    answers = [answer for answer in answers if answer[0]]
    if not answers:
        return
    prompts = tokenizer([prompt for prompt, _, _ in answers], add_special_tokens=False, return_attention_mask=False,
                        verbose=False)["input_ids"]
    encoded.checked += len(answers)
    for inference, (_, training, where) in zip(prompts, answers, strict=True):
        if training[: len(inference)] != inference:
            encoded.mismatched += 1
            at = next((number for number, (left, right) in enumerate(zip(training, inference, strict=False))
                       if left != right), min(len(training), len(inference)))
            near = slice(max(0, at - 4), at + 8)
            seen, fed = (tokenizer.convert_ids_to_tokens(ids[near]) for ids in (training, inference))
            encoded.mismatch = encoded.mismatch or Mismatch(where, seen, fed)


def _sample(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [(tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False), labelled)
            for labelled, group in itertools.groupby(pairs, lambda pair: pair[1] != IGNORED)]


def plain_text(text: str) -> str:
    """`text` without case, spacing and sentence punctuation; signs such as + and - stay, they change a question."""
    return " ".join(re.sub(r"[.,;:!?'\"()\[\]…“”‘’¿¡、。，！？：；]", " ", text.casefold()).split())


def _key(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
