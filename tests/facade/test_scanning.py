"""`scan_data`: what is in the rows, and which rows are the same, nearly the same, or the test split's."""

import json
import random
import tracemalloc

import datasets
import numpy as np
import pytest

from gazelle import SafetyChecker
from gazelle.base.errors import DataError, OptionError
from gazelle.data.similar import Bands, grams, jaccard, plain
from gazelle.facade.scanning import parse_fail_on, scan_data, texts_of

WORDS = [
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "inlet",
    "jetty",
    "knoll",
    "ledge",
    "marsh",
    "north",
    "ocean",
    "prism",
    "quartz",
    "ridge",
]
KEY = "AKIA" + "Q7WERTYUIOPASDFG"


def prose(seed, words=60):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_contents_by_file_line_and_column(tmp_path):
    file = write(tmp_path / "a.jsonl", [
        {"instruction": "say hello", "output": "hello"}, {"instruction": "who?", "output": "ann@mail.org has " + KEY},
        {"instruction": "none", "output": "no"}])
    report = scan_data(file)
    assert report.rows == 3 and report.counts == {"email": 1, "aws_key": 1}
    assert {(found.kind, found.where, found.column, found.start, found.end) for found in report.findings} == {
        ("email", f"{file}, line 2", "output", 0, 12), ("aws_key", f"{file}, line 2", "output", 17, 37)}
    assert KEY not in json.dumps(report.to_dict()) and "ann@" not in json.dumps(report.to_dict())


def test_copies_and_near_copies(tmp_path):
    base = prose(1)
    rows = [{"text": base}, {"text": prose(2)}, {"text": base.upper().replace(" ", "  ")}, {"text": base + " at last"},
            {"text": prose(3)}, {"text": " ".join(reversed(base.split()))}]
    report = scan_data(write(tmp_path / "a.jsonl", rows))
    assert [(found.kind, found.where[-6:], found.other[-6:]) for found in report.findings] == [
        ("duplicate", "line 3", "line 1"), ("near_duplicate", "line 4", "line 1")]


def test_leaks_of_the_test_split(tmp_path):
    base = prose(5)
    train = write(
        tmp_path / "a.jsonl", [{"question": "what is it?", "answer": base}, {"question": "why?", "answer": prose(6)}]
    )
    test = write(tmp_path / "b.jsonl", [
        {"question": "what is it?", "answer": base}, {"question": "Why?", "answer": "because"},
        {"question": "what is it, then?", "answer": base}, {"question": "new", "answer": prose(7)},
        {"question": "new", "answer": prose(7)}])
    report = scan_data(train, test)
    assert (report.rows, report.against) == (2, 5)
    assert [(found.kind, found.where[-6:], found.other[-6:]) for found in report.findings] == [
        ("leak", "line 1", "line 1"), ("leaked_prompt", "line 2", "line 2"), ("near_leak", "line 3", "line 1")]


def test_any_source(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "mail?"}, {"role": "assistant", "content": "ann@mail.org"}]}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "train-0.parquet")
    (tmp_path / "text.txt").write_text("ann@mail.org")
    (tmp_path / "table.csv").write_text("question,answer\nmail?,ann@mail.org\n")
    for source in (
        rows,
        data,
        str(tmp_path / "train-0.parquet"),
        tmp_path / "text.txt",
        tmp_path / "table.csv",
        str(tmp_path),
    ):
        assert scan_data(source).counts["email"] == 1
    assert list(texts_of(rows[0])) == [("messages[0].content", "mail?"), ("messages[1].content", "ann@mail.org")]


def test_candidates_are_the_pairs_that_are_near():
    """Against all pairs, compared exactly."""
    rng, rows = random.Random(9), []
    for seed in range(40):
        words = prose(seed).split()
        rows.append(" ".join(words))
        for change in (1, 3, 8):
            changed = list(words)
            for _ in range(change):
                changed[rng.randrange(len(changed))] = rng.choice(WORDS)
            rows.append(" ".join(changed))
    hashed = [grams(plain(row)) for row in rows]
    bands = Bands()
    for number, hashes in enumerate(hashed):
        bands.add(number, hashes)
    near = {b for a in range(len(rows)) for b in range(a + 1, len(rows)) if jaccard(hashed[a], hashed[b]) >= 0.8}
    candidates = bands.candidates()
    found = {
        row for row, others in candidates.items() if max(jaccard(hashed[row], hashed[other]) for other in others) >= 0.8
    }
    assert len(near) > 30 and found == near


def test_jaccard_is_that_of_sets_of_grams():
    def by_hand(one, other):
        first, second = ({text[at:at + 5] for at in range(len(text) - 4)} for text in (one, other))
        return len(first & second) / len(first | second)

    one, other = plain(prose(1)), plain(prose(1)[:200] + " 在河边 " + prose(2)[:100])
    assert jaccard(grams(one), grams(other)) == pytest.approx(by_hand(one, other))
    assert grams("ab").dtype == np.uint32 and len(grams("")) == 1


def test_memory_is_bounded(tmp_path):
    """Rows of 20 MB in all are never held at once."""
    file, filler = tmp_path / "a.jsonl", "x" * 40_000
    with file.open("w") as out:
        for number in range(500):
            out.write(json.dumps({"text": f"{prose(number, 30)} {filler}"}) + "\n")
    assert file.stat().st_size > 20e6
    checker = SafetyChecker(kinds=["aws_key"])
    scan_data(str(file), checker=checker)  # modules and caches
    tracemalloc.start()
    scan_data(str(file), checker=checker)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_what_cannot_be_scanned(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        scan_data(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        scan_data(str(tmp_path / "bad.jsonl"))
    assert "line 2" in str(caught.value)
    with pytest.raises(OptionError, match="share"):
        scan_data([{"text": "a"}], threshold=0)


def test_names_of_fail_on():
    assert parse_fail_on("duplicate") == ("duplicate", "near_duplicate")
    assert parse_fail_on("near-duplicate, email") == ("near_duplicate", "email")
    assert set(parse_fail_on("leak")) == {"leak", "near_leak", "leaked_prompt"} and "card" in parse_fail_on("any")
    with pytest.raises(OptionError, match="unknown kind"):
        parse_fail_on("emial")


def test_a_senders_address_is_no_role():
    assert scan_data([{"from": "ann@mail.org", "to": "all", "body": "hello"}]).counts == {"email": 1}
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    assert [text for _, text in texts_of({"conversations": turns})] == ["hello", "hi"]
