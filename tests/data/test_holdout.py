"""Held-out rows: nothing in training gives one of them away, and the draw follows from the seed."""

import random
from typing import Any

import pytest

from gazelle.base.errors import DataError, OptionError
from gazelle.data.encode import Encoded, Example
from gazelle.data.holdout import hold_out, hold_out_encoded
from gazelle.data.load import load_conversations
from gazelle.data.read import read_rows


def alpaca(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


def split(data: list[dict[str, Any]], share: float = 0.2, seed: int = 1, column: str | None = None) -> Any:
    rows = read_rows(data)
    return hold_out(load_conversations(rows), share, seed=seed, rows=rows, column=column)


def side(part: Any) -> set[int]:
    return {int(chat.where.removeprefix("row ")) - 1 for chat in part.conversations}


def test_plain_rows_give_the_share_and_lose_none() -> None:
    data = [alpaca(f"Question {n}?", f"Answer {n}.") for n in range(50)]
    train, held = split(data)
    assert len(held.conversations) == 10 and side(train) | side(held) == set(range(50))
    assert side(split(data)[1]) == side(held) != side(split(data, seed=2)[1])
    where = [chat.where for chat in held.conversations]
    assert where == sorted(where, key=lambda text: int(text.split()[1]))
    assert "50 groups; rows held together: none" in train.held_out.line()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_leaks(seed: int) -> None:
    """Copies in other case and width, the same prompt, conversations that go on, documents; also over two steps."""
    draw = random.Random(seed)
    data = [alpaca(f"Question {n}?", f"Answer {n}.", doc=f"d{n}") for n in range(40)]
    data += [alpaca(f"QUESTION {n}", f"answer {n}", doc=None) for n in range(10)]
    data += [alpaca(f"question {n}？", "another answer", doc="") for n in range(5, 15)]
    data += [alpaca(f"About {n}", "text", doc=f"d{n}") for n in range(12, 20)]
    draw.shuffle(data)
    train, held = split(data, 0.25, seed, "doc")
    sides = [[data[at] for at in side(part)] for part in (train, held)]

    def keys(row: dict[str, Any]) -> set[str]:
        number = row["instruction"].strip("?？").split()[1]
        return {f"q{number}"} if row["instruction"][0] in "qQ" and not row["doc"] else {f"q{number}", row["doc"]}

    apart = [set().union(*map(keys, rows)) for rows in sides]
    assert held.conversations and not apart[0] & apart[1]
    assert len(held.conversations) == pytest.approx(0.25 * len(data), abs=4)
    together = train.held_out.together
    assert together["the same text"] == 20 and together["the same doc"] == 16
    assert together["the same prompt"] >= 10 + 10 + 10


def test_a_conversation_and_one_that_goes_on_from_it() -> None:
    def talk(n: int, turns: int) -> dict[str, Any]:
        return {"messages": [message for turn in range(turns) for message in (
            {"role": "user", "content": f"{n} says {turn}"}, {"role": "assistant", "content": f"to {n}, {turn}"})]}

    train, held = split([talk(n, turns) for n in range(10) for turns in (1, 2, 3)], 0.3)
    assert len(held.conversations) == 9
    assert {at // 3 for at in side(held)}.isdisjoint(at // 3 for at in side(train))


def test_the_same_system_prompt_holds_nothing_together() -> None:
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"q {n}"},
                          {"role": "assistant", "content": "yes"}]} for n in range(10)]
    assert split(rows)[0].held_out.groups == 10


def test_texts_and_tokenised_rows() -> None:
    train, held = split([{"text": f"text {n // 2}"} for n in range(20)])
    assert len(held.conversations) == 4
    assert {at // 2 for at in side(held)}.isdisjoint(at // 2 for at in side(train))
    examples = [Example([7, n // 2, 8, n], [-100, -100, -100, n], "") for n in range(20)]
    train, held, note = hold_out_encoded(Encoded(examples), 0.2, seed=3)
    assert {row.input_ids[1] for row in held.examples}.isdisjoint(row.input_ids[1] for row in train.examples)
    assert len(held.examples) == 4 and note.together == {"the same prompt": 20}


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"eval_split 0.1 of 1 rows"):
        split([alpaca("a", "b")], 0.1)
    with pytest.raises(DataError, match="the largest of 9"):
        split([alpaca("same", f"{n}") for n in range(9)], 0.5)
    with pytest.raises(OptionError, match="did you mean 'document'"):
        split([alpaca(f"a{n}", "b", document="x") for n in range(9)], column="documnt")
