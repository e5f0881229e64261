"""`gazelle scan`: what it prints and writes, and its exit codes."""

import json

import pytest

from gazelle.__main__ import main


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "write to ann@mail.org"}\n{"text": "fine"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "fine"}\n')


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--fail-on", "secret"], 0),
        (["--fail-on", "pii"], 1),
        (["--fail-on", "secret", "--fail-on", "email"], 1),
        (["--fail-on", "any"], 1),
        (["--fail-on", "leak"], 0),
        (["--against", "test.jsonl", "--fail-on", "leak"], 1),
        (["--fail-on", "emial"], 2),
        (["--against", "none.jsonl"], 2),
        (["--json", "no/such/report.json"], 2),
        (["--json", "."], 2),
        (["--threshold", "7"], 2),
    ],
)
def test_exit_codes(data, options, code, capsys):
    assert main(["scan", "data.jsonl", *options]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "ann@" not in printed.out + printed.err


def test_what_is_printed_and_written(data, capsys, tmp_path):
    assert main(["scan", "data.jsonl", "--against", "test.jsonl", "--json", "report.json"]) == 0
    printed = capsys.readouterr().out
    assert "2 rows, and 1 of test.jsonl to look for in them" in printed
    assert "data.jsonl, line 1: email in text, characters 9 to 21: an e-mail address" in printed
    assert "test.jsonl, line 1: leak: the training data has the same row (data.jsonl, line 2)" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 2 and report["counts"] == {"email": 1, "leak": 1}
    assert report["findings"][0] | {"reason": ""} == {
        "kind": "email",
        "where": "data.jsonl, line 1",
        "reason": "",
        "column": "text",
        "start": 9,
        "end": 21,
        "other": "",
    }


def test_nothing_to_find(data, capsys):
    assert main(["scan", "test.jsonl", "--fail-on", "any"]) == 0
    assert "Nothing was found." in capsys.readouterr().out
