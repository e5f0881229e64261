"""Bad input, one line a case: the class of the error, where it points, and that it says what to do."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.data.conftest import load_data

from gazelle.base.errors import DataError, OptionError, UserError

GOOD = '{"question": "a", "answer": "b"}\n'


def messages(*turns: tuple[str, object]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            {"messages": [{"role": role, "content": content} for role, content in turns]}]


# name -> (file name and bytes, or a source; options; error class; part of where; part of the message)
CASES: dict[str, tuple[Any, dict[str, Any], type[UserError], str, str]] = {
    "empty file": (("a.jsonl", b""), {}, DataError, "a.jsonl", "empty"),
    "only blank lines": (("a.jsonl", b"\n\n"), {}, DataError, "a.jsonl", "no rows"),
    "header alone": (("a.csv", b"question,answer\n"), {}, DataError, "a.csv", "no rows"),
    "bad json": (("a.json", b'[{"question": "a",\n "answer": "b",}]'), {}, DataError, "a.json, line 2, column", "JSON"),
    "bad json line": (("a.jsonl", GOOD.encode() + b'{"a": \n'), {}, DataError, "a.jsonl, line 2, column", "JSON"),
    "row is a number": (("a.jsonl", GOOD.encode() + b"7\n"), {}, DataError, "a.jsonl, line 2", "not an object"),
    "no list inside": (("a.json", b'{"a": 1}'), {}, DataError, "a.json, line 1", "rows"),
    "json is a string": (("a.json", b'"text"'), {}, DataError, "a.json, line 1", "no list"),
    "latin-1": (("a.jsonl", GOOD.encode() + b'{"question": "caf\xe9"}'), {}, DataError, "a.jsonl, line 2", "UTF-8"),
    "latin-1 csv": (("a.csv", b"text\nok\ncaf\xe9\n"), {}, DataError, "a.csv, line 3", "UTF-8"),
    "ragged csv": (("a.csv", b'question,answer\n"a\nb",c\nd,e,f\n'), {}, DataError, "a.csv, line 4", "fields"),
    "open quote": (("a.csv", b'question,answer\n"a,b\n'), {}, DataError, "a.csv, line 2", "parsed"),
    "repeated header": (("a.csv", b"text,text\na,b\n"), {}, DataError, "a.csv, line 1", "header"),
    "not parquet": (("a.parquet", b"PAR1 no"), {}, DataError, "a.parquet", "Parquet"),
    "unknown suffix": (("a.xlsx", b"PK"), {}, DataError, "a.xlsx", ".xlsx"),
    "no such file": ("a.jsom", {}, DataError, "a.jsom", "no such file"),
    "no such json": ("a.json", {}, DataError, "a.json", "no such file"),
    "a text for a path": ("x" * 5000, {}, DataError, "xxx", "looked up"),
    "deep json": (("a.json", b"[" * 200_000), {}, DataError, "a.json, line 1", "JSON"),
    "deep json line": (("a.jsonl", GOOD.encode() + b'{"a":' * 200_000), {}, DataError, "a.jsonl, line 2", "JSON"),
    "deep json cell": ([{"messages": "[" * 200_000}], {}, DataError, "row 1", "not valid JSON"),
    "nothing in list": ([], {}, DataError, "list", "no rows"),
    "list of strings": (["a"], {}, DataError, "row 1", "dict"),
    "not data": (7, {}, DataError, "int", "cannot be read"),
    "no such split": (datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}])), {"split": "tset"},
                      DataError, "DatasetDict", "split"),
    "wrong columns": ([{"q": "a", "a": "b"}], {}, DataError, "row 1", "no known format"),
    "mixed schemas": ([{"text": "a"}, {"question": "a", "answer": "b"}], {}, DataError, "row 2", "different formats"),
    "unknown format": ([{"text": "a"}], {"format": "sharegtp"}, OptionError, "format", "sharegtp"),
    "format without columns": ([{"text": "a"}], {"format": "alpaca"}, DataError, "row 1", "column"),
    "map to no column": ([{"q": "a"}], {"columns": {"question": "frage"}}, DataError, "columns", "frage"),
    "map of no column": ([{"q": "a"}], {"columns": {"qestion": "q"}}, OptionError, "columns", "qestion"),
    "null answer": (("a.jsonl", GOOD.encode() + b'{"question": "a", "answer": null}'), {}, DataError, "a.jsonl, line 2",
                    "'answer' is missing"),
    "empty answer": (("a.csv", b"question,answer\na,b\nc,\n"), {}, DataError, "a.csv, line 3", "'answer' is empty"),
    "number": ([{"question": "1 + 1", "answer": 2}], {}, DataError, "row 1", "'answer' is not a text"),
    "half a character": ([{"question": "a", "answer": "\ud83e"}], {}, DataError, "row 1", "half of a character"),
    "empty messages": ([{"messages": []}], {}, DataError, "row 1", "empty"),
    "null messages": ([{"messages": None}], {}, DataError, "row 1", "missing"),
    "messages not json": ([{"messages": "[{"}], {}, DataError, "row 1", "not valid JSON"),
    "message is a string": ([{"messages": ["hi"]}], {}, DataError, "row 1, message 1", "no role"),
    "unknown role": (messages(("user", "a"), ("asistant", "b")), {}, DataError, "row 2, message 2", "asistant"),
    "empty message": (messages(("user", "a"), ("assistant", " ")), {}, DataError, "row 2, message 2", "empty"),
    "image": (messages(("user", [{"type": "image"}])), {}, DataError, "row 2, message 1", "other than text"),
    "no assistant": (messages(("user", "a")), {}, DataError, "row 2", "no assistant"),
    "two systems": (messages(("system", "a"), ("system", "b"), ("assistant", "c")), {}, DataError, "row 2", "system"),
    "call of nothing": ([{"messages": [{"role": "assistant", "tool_calls": [{"id": "7"}]}]}], {}, DataError,
                        "row 1, message 1", "names no function"),
    "tools not a list": ([{"question": "a", "answer": "b", "tools": "{}"}], {}, DataError, "row 1", "tools"),
    "history of words": ([{"instruction": "a", "output": "b", "history": ["c"]}], {}, DataError, "row 1", "history"),
    "all cut away": ([{"question": "a" * 99, "answer": "b"}], {}, DataError, "row 1", "max_length"),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed(case: str, chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options, kind, where, what = CASES[case]
    monkeypatch.chdir(tmp_path)
    if isinstance(source, tuple):
        Path(source[0]).write_bytes(source[1])
        source = source[0]
    with pytest.raises(kind) as caught:
        load_data(source, chatml, max_length=50, **options)
    error = caught.value
    assert type(error) is kind
    assert where in error.where
    assert what in error.what
    assert error.found
    assert error.expected
    assert error.fix


def test_nearest_names(chatml: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "trian.jsonl", chatml, max_length=50)
    assert "train.jsonl" in caught.value.fix
    with pytest.raises(DataError) as caught:
        load_data(messages(("user", "a"), ("asistant", "b")), chatml, max_length=50)
    assert "did you mean 'assistant'" in caught.value.fix


def test_folders_without_data_or_split(chatml: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(DataError, match="no data files") as caught:
        load_data(tmp_path, chatml, max_length=50)
    assert "notes.pdf" in caught.value.found
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match="no split 'test'") as caught:
        load_data(tmp_path, chatml, max_length=50, split="test")
    assert caught.value.expected == "train"


def test_many_bad_rows_are_counted(chatml: Any) -> None:
    rows = [{"question": "a", "answer": answer} for answer in ("b", None, "", "c", 3)]
    with pytest.raises(DataError, match="3 of 5 rows cannot be used") as caught:
        load_data(rows, chatml, max_length=50)
    assert caught.value.where == "row 2"


def test_errors_of_mixed_rows_show_both(chatml: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_data([{"text": "a"}, {"text": "a"}, {"prompt": "a", "completion": "b"}], chatml, max_length=50)
    assert caught.value.where == "row 3"
    assert "prompt, completion" in caught.value.found
    assert "text" in caught.value.expected
