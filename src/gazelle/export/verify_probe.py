"""What an export and the model in memory are both asked: strings, prompts and rows, the user's if there are."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gazelle.data.conversation import Conversation, Turn
from gazelle.data.encode import IGNORED, encode
from gazelle.export.consumers import hf
from gazelle.models.modes import evaluating, in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS, TOKENS, ROWS = 8, 32, 16
_LONGEST = 512  # tokens of a row, so that a check takes minutes at most
_KEPT = 1 << 24  # logits kept of each side, 64 MB
_MIXED = (
    "Hello, world!", "hello", " hello", "Hello  world   with    runs of spaces", "\ttab\tand\t\ttabs",
    "line\nbreaks\n\n\n", "trailing space ", "The year 2024, 3.14159, 1,000,000 and 0x1F.",
    "don't can't we'll I'M SHE'S", "naïve café über Straße",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # code",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }", "SELECT * FROM t WHERE a >= 'x';", "你好，世界！今天天气怎么样？",
    "こんにちは世界。カタカナとひらがな", "안녕하세요 세계", "Привет, мир! Как дела?", "مرحبا بالعالم", "नमस्ते दुनिया",
    "🙂🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️", "a\u0301 e\u0308 ﬁ ①②③", "\u200b\u00a0\u3000 odd spaces",
    "https://example.org/path?q=1&r=%20#top",
    "<b>tags</b> & &amp; {braces} [brackets] |pipes|", "x²+y³≠√π → ∞ · ½", "A" * 38, "...!!!???---___***",
    "CamelCaseAndsnake_case_and-kebab-case",
)
_PROMPTS = ("What is the capital of France?", "List three prime numbers.", "Translate 'good morning' to Spanish.",
            "Why is the sky blue?", "Write a function that adds two numbers.", "What is 12 times 12?")
_TEXT = ("Water boils at a lower temperature on a mountain than by the sea, because the air above it weighs less.",
         "The library opens at nine in the morning and closes at six in the evening, except on Sundays.",
         "A prime number is a whole number greater than one that no other whole number but one divides.")


@dataclass(frozen=True)
class Probe:
    """Questions with known ids.

    Attributes:
        source: where the prompts come from.
        texts, text_ids: strings, and their ids without special tokens.
        chats, prompts: conversations up to an answer, and their ids as in training; for raw text no chats.
        rows: {"ids", "at"}, as `consumers` describes them.
        stops: ids at which the model in memory stops.
        kept: how many positions' logits are compared.
    """

    source: str
    texts: list[str]
    text_ids: list[list[int]]
    chats: list[list[dict[str, Any]]]
    prompts: list[list[int]]
    rows: list[dict[str, list[int]]]
    stops: list[int]
    kept: int

    def request(self) -> dict[str, Any]:
        """The part of a consumer's request that is the same for all of them."""
        return {"texts": self.texts, "chats": self.chats, "prompts": self.prompts, "tokens": TOKENS,
                "stops": self.stops, "rows": self.rows, "kept": self.kept, "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Reference:
    """What the model in memory says to a probe, as a consumer would."""

    given: dict[str, Any]
    logits: "np.ndarray[Any, np.dtype[np.float32]]"


def make_probe(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], source: str, *,
               stops: list[int], longest: int = _LONGEST) -> Probe:
    """A probe from conversations spread over the whole file; from a few shipped ones where there are none.

    Raises:
        DataError: no conversation has an answer within `longest` tokens.
    """
    if not conversations:
        conversations, source = _shipped(tokenizer), "a few built-in prompts"
    spread = np.linspace(0, len(conversations) - 1, min(ROWS, len(conversations)), dtype=int)
    chosen = [conversations[i] for i in spread]
    limit = min(longest, _LONGEST)
    by_place = {row.where: row for row in chosen}
    rows, chats, texts = [], [], list(_MIXED)
    prompts: list[list[int]] = []
    for example in encode(chosen, tokenizer, max_length=limit).examples:
        ids, row = list(example.input_ids), by_place[example.where]
        learnt = np.flatnonzero(np.array(example.labels) != IGNORED)
        rows.append({"ids": ids, "at": (learnt - 1).tolist()})
        if len(prompts) == PROMPTS or len(ids) == limit or row.tools:
            continue
        if row.text is not None:
            texts.append(row.text[:1000])
            prompts.append(ids[:max(1, len(ids) // 2)])
        elif row.turns[-1].role == "assistant":
            answer = learnt[np.flatnonzero(np.diff(learnt, prepend=-2) > 1)[-1]]
            texts.append(row.turns[-1].content[:1000])
            chats.append(row.messages()[:-1])
            prompts.append(ids[:answer])
    text_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Probe(source, texts, text_ids, chats, prompts, rows, stops, max(1, _KEPT // len(tokenizer)))


def ask_model(model: Any, probe: Probe) -> Reference:
    """The answers of the model in memory."""
    wide = in_float32(model) if model.device.type == "cpu" else contextlib.nullcontext()
    with evaluating(model), wide:
        given, logits = hf.ask(model, probe.request())
    return Reference(given, np.empty((0, 0), np.float32) if logits is None else logits)


def _shipped(tokenizer: Any) -> list[Conversation]:
    texts = [Conversation((), f"text {number}", text=text) for number, text in enumerate(_TEXT, 1)]
    if not tokenizer.chat_template:
        return texts
    return [*(Conversation((Turn("user", question), Turn("assistant", text)), question)
              for question, text in zip(_PROMPTS, _TEXT * 2, strict=True)), *texts]
