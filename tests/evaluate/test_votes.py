"""Votes on pairs of answers: kept at once, resumed, counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from gazelle.base.errors import DataError, OptionError
from gazelle.evaluate.votes import Pair, VoteFile, pairs_of, tally


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """What the parts of an evaluation that votes need look like."""
    folder = tmp_path / "eval"
    folder.mkdir()
    answers: list[dict[str, str]] = [{"base": f"base {number}", "tuned": f"tuned {number}", "third": "x"}
                                     for number in range(20)]
    answers[4] = {"base": "the same", "tuned": "the same ", "third": "x"}
    (folder / "evaluation.json").write_text(json.dumps({
        "models": {"base": {}, "tuned": {}, "third": {}},
        "cases": [{"messages": [{"role": "user", "content": f"question {number}"}], "answers": said}
                  for number, said in enumerate(answers)]}))
    return folder


def test_pairs_are_shuffled_and_named_nowhere(report: Path) -> None:
    pairs = pairs_of(report, ["base", "tuned"], seed=1)
    orders = {pair.models for pair in pairs}
    assert orders == {("base", "tuned"), ("tuned", "base")}
    assert all(pair.answers[0].startswith(pair.models[0]) for pair in pairs if not pair.same)
    other = pairs_of(report / "evaluation.json", ["tuned", "base"], seed=2)
    assert [pair.key for pair in other] == [pair.key for pair in pairs]
    assert [pair.models for pair in other] != [pair.models for pair in pairs]
    assert [pair.same for pair in pairs].count(True) == 1


def test_votes_survive_a_kill_in_the_middle_of_a_line(report: Path, tmp_path: Path) -> None:
    pairs = pairs_of(report, ["base", "tuned"], seed=1)
    path = tmp_path / "votes.jsonl"
    kept = VoteFile(path)
    kept.add(pairs[0], "a")
    kept.add(pairs[1], "tie")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "torn')
    again = VoteFile(path)
    assert set(again.votes) == {pairs[0].key, pairs[1].key}
    again.add(pairs[2], "b")
    assert path.read_bytes().startswith(whole) and b"torn" not in path.read_bytes()
    assert len(VoteFile(path).votes) == 3
    assert again.votes[pairs[2].key].winner == pairs[2].models[1]


def test_a_tally_with_its_sign_test(report: Path, tmp_path: Path) -> None:
    pairs = pairs_of(report, ["base", "tuned"], seed=3)
    kept = VoteFile(tmp_path / "votes.jsonl")
    for number, pair in enumerate(pairs[5:15]):
        better = "tuned" if number < 8 else "base"
        kept.add(pair, "a" if pair.models[0] == better else "b")
    kept.add(pairs[0], "tie")
    kept.add(pairs[1], "skip")
    kept.add(pairs[2], "skip")
    kept.add(pairs[2], "tie")  # the last word counts
    found = tally(pairs, kept.votes)
    assert found.wins == {"base": 2, "tuned": 8}
    assert (found.ties, found.skipped, found.same) == (2, 1, 1)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_votes_on_other_answers_do_not_count(report: Path, tmp_path: Path) -> None:
    pairs = pairs_of(report, ["base", "tuned"])
    kept = VoteFile(tmp_path / "votes.jsonl")
    kept.add(pairs[0], "a")
    changed = [Pair(pairs[0].question, pairs[0].models, ("new", pairs[0].answers[1])), *pairs[1:]]
    assert sum(tally(changed, kept.votes).wins.values()) == 0
    assert tally([], {}).p == 1.0


@pytest.mark.parametrize(("models", "said"), [
    ([], "two models are compared"), (["base"], "two models are compared"), (["base", "tunde"], "no such model"),
])
def test_which_two(report: Path, models: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        pairs_of(report, models)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"models": 1, "cases": []}'])
def test_no_evaluation(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match="there is no evaluation"):
        pairs_of(tmp_path)


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"key": "k", "models": ["a", "b"], "choice": "c", "at": ""}'])
def test_a_line_that_is_no_vote_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="no vote") as caught:
        VoteFile(path)
    assert caught.value.where.endswith("line 1")


def test_a_report_with_a_hole_and_a_folder_for_votes(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"a": {}, "b": {}}, "cases": [
        {"messages": [{"role": "user", "content": "q"}], "answers": {"a": "1"}}]}))
    with pytest.raises(DataError, match="no evaluation"):
        pairs_of(tmp_path)
    with pytest.raises(DataError, match="kept in a file"):
        VoteFile(tmp_path)
