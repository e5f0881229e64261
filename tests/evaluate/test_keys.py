"""Grading by key facts."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gazelle.evaluate.keys import Question, contains_keys, grade


@pytest.mark.parametrize(
    ("answer", "keys", "right"),
    [
        ("Ask Brida SONNICK in accounts.", ["Brida Sonnick"], True),
        ("Ask Brida.", ["Brida Sonnick"], False),
        ("It is teal, and 42 grams.", ["teal", "42"], True),
        ("It is teal.", ["teal", "42"], False),
        ("Straße", ["STRASSE"], True),
    ],
)
def test_every_key_must_occur(answer: str, keys: list[str], right: bool) -> None:
    assert contains_keys(answer, keys) is right


def test_grading_asks_the_model(demo_model: Callable[[], Any], demo_tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [Question([{"role": "user", "content": "What is the capital of France?"}], ("Paris",), "a"),
                 Question([{"role": "user", "content": "What is the capital of France?"}], ("Vessenbrook",), "b")]
    right, wrong = grade(demo_model(), demo_tokenizer, questions, max_new_tokens=16)
    assert right.right and not wrong.right
    assert right.answer == wrong.answer
