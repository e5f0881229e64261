"""Every figure of the report on a set small enough to count by hand."""

import json
from typing import Any

from rich.console import Console
from tests.data.conftest import load_data

from gazelle.data.encode import Encoded, Example, Mismatch
from gazelle.data.report import data_report


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def test_figures_by_hand(chatml: Any) -> None:
    train = load_data(rows(("A", "b"), ("A", "b"), ("A", "b" * 30), ("A" * 80, "b")), chatml, max_length=40)
    test = load_data(rows(("a?", "c"), ("A", "b"), ("new", "b")), chatml, max_length=40)
    report = data_report(train, test)
    shortest = train.lengths[0]
    assert train.lengths == [shortest, shortest, shortest + 29, shortest + 79]
    split = report.train
    assert (split.source, split.format, split.rows, split.examples) == ("list", "question-answer", 4, 3)
    assert split.quantiles == {"min": shortest, "50 %": shortest + 29, "90 %": shortest + 79, "99 %": shortest + 79,
                               "max": shortest + 79}
    assert split.tokens == 2 * shortest + min(shortest + 29, 40)
    assert split.labelled_tokens == sum(label != -100 for example in train.examples for label in example.labels)
    assert train.examples[0].labels.count(-100) == shortest - 2  # "b" and the end-of-turn token
    assert (split.truncated, split.dropped, split.duplicates) == (2, 1, 1)
    assert (split.checked, split.mismatched) == (4, 0)
    assert (report.overlap_rows, report.overlap_prompts) == (1, 2)
    assert [piece for piece, labelled in split.sample if labelled] == ["b<|im_end|>"]
    for part in (f"max_length={shortest + 79}", "left out", "exact copies", "test prompts"):
        assert any(part in warning for warning in report.warnings)


def test_report_in_every_shape(chatml: Any) -> None:
    report = data_report(load_data(rows(("A", "b")), chatml, max_length=40))
    assert report.warnings == []
    assert json.loads(json.dumps(report.to_dict()))["train"]["rows"] == 1
    lines = report.lines()
    assert any(line.split() == ["rows", "1"] for line in lines)
    assert "  ⟦b<|im_end|>⟧" in lines
    console = Console(width=100, record=True, quiet=True)
    console.print(report.table())
    both = data_report(load_data(rows(("A", "b")), chatml, max_length=40),
                       load_data([{"text": "fox"}], chatml, max_length=40))
    assert any(line.startswith("format") and line.split()[1:] == ["question-answer", "text"] for line in both.lines())


def test_warnings_name_the_first_case() -> None:
    encoded = Encoded([Example([1, 2], [-100, 2], "row 1")], 40, boundary_merges=3, unclosed=2, unlabelled=6,
                      incomplete=7, checked=5, mismatched=4, mismatch=Mismatch("row 9", ["a"], ["b"]))
    warnings = data_report(encoded).warnings
    assert any("4 of 5" in warning and "row 9" in warning and "chat_template=" in warning for warning in warnings)
    assert any(warning.startswith("3 tokens") for warning in warnings)
    assert any(warning.startswith("6 of 1 rows") and "no token to learn" in warning for warning in warnings)
    assert any(warning.startswith("7 of 1 rows") and "chat_template=" in warning for warning in warnings)
    assert any(warning.startswith("2 answers") for warning in warnings)


def test_columns_not_used_are_listed(chatml: Any) -> None:
    source = [{"id": 1, "question": "A", "answer": "b", "fact": "c"}]
    report = data_report(load_data(source, chatml, max_length=40))
    assert any(line.split("  ")[0] == "columns not used" and line.endswith("id, fact") for line in report.lines())
    assert report.to_dict()["train"]["unused"] == ["id", "fact"]
    assert report.warnings == []
    plain = data_report(load_data(rows(("A", "b")), chatml, max_length=40))
    assert not any("not used" in line for line in plain.lines())
