"""Test cases from every form they come in, and what is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from gazelle.base.errors import DataError
from gazelle.cli.demo import PACKAGE
from gazelle.evaluate.cases import by_category, read_cases


def test_a_plain_case() -> None:
    case, = read_cases([{"input": "法国的首都是哪里?", "expected": "巴黎"}])
    assert case.messages == [{"role": "user", "content": "法国的首都是哪里?"}]
    assert case.question == "法国的首都是哪里?"
    assert (case.expected, case.keys, case.category, case.where) == (("巴黎",), (), "", "row 1")


def test_all_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"input": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                   {"role": "user", "content": "6 × 7?"}], "expected": ["42", "forty-two"], "keys": ["42"],
         "category": "sums", "system": "Be brief."},
        {"input": "1.5 + 1?", "expected": 2.5, "category": "sums"},
        {"input": "Sing.", "category": "songs"},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = read_cases(str(path))
    assert [turn.role for turn in cases[0].turns] == ["system", "user", "assistant", "user"]
    assert cases[0].expected == ("42", "forty-two")
    assert cases[1].expected == ("2.5",)
    assert cases[2].expected == ()
    assert cases[1].where == f"{path}, line 2"
    assert by_category(cases) == {"sums": [0, 1], "songs": [2]}
    assert read_cases(cases) == cases


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text('input,expected,category\n"Which, exactly?","This, exactly.",a\n"And?",,b\n')
    first, second = read_cases(path)
    assert (first.question, first.expected, first.category) == ("Which, exactly?", ("This, exactly.",), "a")
    assert second.expected == ()


def test_rows_of_training() -> None:
    cases = read_cases(PACKAGE / "demo" / "test.jsonl")
    assert len(cases) == 80
    assert cases[2].question == "Where can I get one?\n\nI need a spare gasket for this repair."
    assert cases[2].keys == ("blue drawer",)
    assert cases[2].expected == ("Spare gaskets are kept in the blue drawer under the packing bench.",)
    chat, = read_cases([{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                                      {"role": "assistant", "content": "A"}]}])
    assert [message["role"] for message in chat.messages] == ["system", "user"] and chat.expected == ("A",)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"input": "Q", "expected": "A"}, {"expected": "A"}], "row 2"),
    ([{"input": "  "}], "'input' is empty"),
    ([{"input": "Q", "expected": ["A", None]}], "'expected' is missing"),
    ([{"input": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}], "could answer"),
    ([{"input": [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}]}], "could answer"),
    ([{"text": "a text"}], "no question with an answer"),
    ([{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "Q"}]}], "no question with an answer"),
    ([{"question": "Q", "answer": "A", "tools": [{"type": "function"}]}], "tools"),
    ([], "no rows"),
])
def test_what_is_no_case(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_cases(rows)
    assert said in str(caught.value)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"input": "Q", "expected": "A"}\n{"input": \n')
    with pytest.raises(DataError) as caught:
        read_cases(path)
    assert "line 2" in caught.value.where


