"""Accuracy by key facts: an answer is right when it contains every key string of its row."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gazelle.models.generate import generate_texts


@dataclass(frozen=True)
class Question:
    """A chat prompt, the strings a right answer contains (any case), and the category it is counted in."""

    messages: list[dict[str, str]]
    keys: tuple[str, ...]
    category: str


@dataclass(frozen=True)
class Graded:
    """One answer and whether it was right."""

    question: Question
    answer: str
    right: bool


def contains_keys(answer: str, keys: Sequence[str]) -> bool:
    """True if every key occurs in the answer, upper or lower case."""
    folded = answer.casefold()
    return all(key.casefold() in folded for key in keys)


def grade(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *,
    max_new_tokens: int = 48, batch_size: int = 80,
) -> list[Graded]:
    """Ask every question (greedy decoding) and judge the answers."""
    answers = generate_texts(model, tokenizer, [list(question.messages) for question in questions],
                             max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [Graded(question, answer, contains_keys(answer, question.keys))
            for question, answer in zip(questions, answers, strict=True)]


def accuracy_by_category(graded: Sequence[Graded]) -> dict[str, tuple[int, int]]:
    """Category → (right, asked), in the order in which categories first come up."""
    counts: dict[str, tuple[int, int]] = {}
    for item in graded:
        right, asked = counts.get(item.question.category, (0, 0))
        counts[item.question.category] = (right + item.right, asked + 1)
    return counts
