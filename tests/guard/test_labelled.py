"""The labelled texts, on the half that rules were tuned on and on the half that nobody looked at."""

import pytest
from benchmarks.guard import measure, texts


def test_there_are_enough_of_every_sort():
    labelled = texts()
    assert len(labelled) >= 300 and len({entry.text for entry in labelled}) == len(labelled)
    assert 3 * sum(not entry.labels for entry in labelled) >= len(labelled)
    assert {entry.lang for entry in labelled} == {"en", "zh"}
    assert all((entry.group == "benign") == (not entry.labels) for entry in labelled)


@pytest.mark.parametrize("split", ["tuning", "held-out"])
def test_patterns_and_personal_data(split):
    found = measure()[split]["pattern and pii"]
    assert found["precision"] >= 0.98 and found["recall"] >= 0.95


def test_credentials():
    report = measure()
    for split in ("tuning", "held-out"):
        assert report[split]["secret"]["precision"] >= 0.95 and report[split]["secret"]["recall"] >= 0.95
