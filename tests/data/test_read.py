"""Where rows are said to come from, splits, and odd but legal files."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gazelle.base.errors import DataError
from gazelle.data.load import load_conversations
from gazelle.data.read import read_rows


def test_where_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [where for _, where in read_rows("a.jsonl")] == ["a.jsonl, line 1", "a.jsonl, line 3"]
    Path("a.csv").write_text('text,n\n"one\ntwo",1\n\nthree,2\n')
    assert [where for _, where in read_rows("a.csv")] == ["a.csv, line 2", "a.csv, line 5"]
    Path("a.json").write_text('[{"text": "one"}]')
    assert [where for _, where in read_rows(Path("a.json"))] == ["a.json, row 1"]
    assert [where for _, where in read_rows([{"text": "one"}])] == ["row 1"]


def test_json_that_holds_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [row["text"] for row, _ in read_rows(tmp_path / "a.json")] == ["one", "two"]


def test_long_csv_cells_and_missing_parquet_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "a.csv")[0][0]["text"]) == 200_000
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [float("nan"), 1.0]}), tmp_path / "a.parquet")
    assert [row for row, _ in read_rows(tmp_path / "a.parquet")] == [{"text": "a", "n": None}, {"text": None, "n": 1.0}]


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "dev.json", "notes.jsonl"):
        (tmp_path / name).write_text(json.dumps([{"text": name}] if name.endswith("json") else {"text": name}))
    assert [row["text"] for row, _ in read_rows(tmp_path)] == ["train-0.jsonl", "train-1.jsonl"]
    assert [row["text"] for row, _ in read_rows(tmp_path, split="validation")] == ["dev.json"]
    for name in ("train-1.jsonl", "train-0.jsonl", "dev.json"):
        (tmp_path / name).unlink()
    assert len(read_rows(tmp_path, split="test")) == 1  # nothing is named after a split, so all of it is read


def test_a_folder_written_by_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "one"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "many")
    assert read_rows(tmp_path / "one")[0] == ({"text": "one"}, f"{tmp_path / 'one'}, row 1")
    assert len(read_rows(tmp_path / "many", split="test")) == 1


def test_eval_is_the_test_part_or_else_the_validation_part(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation", "test")}
    source = datasets.DatasetDict(parts)
    for name in ("dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert read_rows(source, split="eval")[0][0] == {"text": "test"}
    assert read_rows(tmp_path, split="eval")[0][0] == {"text": "test"}
    source.pop("test")
    (tmp_path / "test.jsonl").unlink()
    assert read_rows(source, split="eval")[0][0] == {"text": "validation"}
    assert read_rows(tmp_path, split="eval")[0][0] == {"text": "dev"}
    source.pop("validation")
    with pytest.raises(DataError, match="no split"):
        read_rows(source, split="eval")


def test_a_text_column_that_is_named_wins(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "text": "c"}]
    assert load_conversations(rows).format == "alpaca"
    assert load_conversations(rows, text_column="text").conversations[0].text == "c"
    assert load_conversations(rows, text_column="absent").format == "alpaca"


def test_streams_and_unreachable_names_are_refused() -> None:
    with pytest.raises(DataError, match="streamed") as caught:
        read_rows(datasets.Dataset.from_list([{"text": "one"}]).to_iterable_dataset())
    assert "take(" in caught.value.fix
    with pytest.raises(DataError, match="hub") as caught:  # the tests run offline
        read_rows("nobody/nothing:config")
    assert caught.value.where == "nobody/nothing:config"
    assert "connection" in caught.value.fix
    assert "path" in caught.value.fix


def test_hub_data_sets_that_are_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found data.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="hub") as caught:
        read_rows("owner/name")
    assert "scripts" in caught.value.found
