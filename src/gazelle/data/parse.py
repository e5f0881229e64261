"""Data files to rows: JSON, JSONL, CSV, TSV, Parquet and plain text. One function a file type."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gazelle.base.errors import DataError

Row = tuple[dict[str, Any], str]  # the row, and where it was read: "data.jsonl, line 17"


class ArrowRow(dict[str, Any]):
    """A row out of an Arrow table. All structs of a column have the same fields there, so a None inside a cell may
    stand for a field that the row never had."""


def load_json(text: str) -> Any:
    """`json.loads`, with the same error for JSON nested too deeply for it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def parse_file(path: Path) -> list[Row]:
    """The rows of one file, each with the place it came from. Raises what `stream_file` does."""
    return list(stream_file(path))


def stream_file(path: Path) -> Iterator[Row]:
    """The rows of one file as they are read, so that only JSON that is one array, and plain text, are held as a whole.

    Raises:
        DataError: unknown suffix, empty file, text that is not UTF-8, or a row that cannot be parsed.
    """
    if path.suffix.lower() not in PARSERS:
        raise DataError(f"files of type {path.suffix or '(no suffix)'!r} cannot be read", where=str(path),
                        found=path.name, expected="one of " + ", ".join(PARSERS),
                        fix="convert the file, or rename it if it is one of these types")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path), found="0 bytes", expected="at least one row",
                        fix="check that the file was written completely")
    return PARSERS[path.suffix.lower()](path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise DataError("the file is not UTF-8 text", where=f"{path}, line {line}",
                        found=f"byte 0x{error.object[error.start]:02x} at byte {column} of the line",
                        expected="UTF-8, with or without a byte order mark",
                        fix="save it as UTF-8, for example: iconv -f latin1 -t utf-8 old > new") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError("a row is not an object", where=where, found=repr(value),
                        expected='an object with named columns, such as {"question": ..., "answer": ...}',
                        fix="give every row column names")
    return value


def _json(path: Path) -> Iterator[Row]:
    text = _text(path)
    try:
        value = load_json(text)
    except json.JSONDecodeError as error:
        # One object a line is often saved as .json: after the first object, the parser meets "extra data".
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise _bad_json(error, f"{path}, line {error.lineno}, column {error.colno}", text) from error
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        if len(lists) != 1:
            raise DataError("the rows cannot be told from the rest of the file", where=f"{path}, line 1",
                            found=f"an object with {len(lists)} lists", expected='an array of rows, or {"data": [...]}',
                            fix="keep one list of rows in the file")
        value = lists[0]
    if not isinstance(value, list):
        raise DataError("the file holds no list of rows", where=f"{path}, line 1", found=repr(value),
                        expected='an array of rows, or {"data": [...]}', fix="wrap the rows in [ ]")
    for number, row in enumerate(value, 1):
        where = f"{path}, row {number}"
        yield _object(row, where), where


def _json_lines(path: Path) -> Iterator[Row]:
    # Lines of bytes end at \n alone: U+2028 and its like are legal inside a JSON string.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
            except UnicodeDecodeError:
                _text(path)  # says where
                raise
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = load_json(line)
            except json.JSONDecodeError as error:
                raise _bad_json(error, f"{where}, column {error.colno}", line) from error
            yield _object(value, where), where


def _bad_json(error: json.JSONDecodeError, where: str, text: str) -> DataError:
    near = text[max(0, error.pos - 20) : error.pos + 20]
    return DataError("this is not valid JSON", where=where, found=f"{error.msg}, near {near!r}",
                     expected="JSON: double quotes, commas between entries, none after the last",
                     fix="mend the line, or write the file with a JSON library")


def _csv(path: Path, delimiter: str = "") -> Iterator[Row]:
    # The module's own limit of 128 kB is shorter than some answers.
    limit = csv.field_size_limit(max(path.stat().st_size, 1))
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            # Spreadsheets in much of Europe write ";", because "," is their decimal point.
            delimiter = delimiter or (";" if head.count(";") > head.count(",") else ",")
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader)
            if len(set(names)) != len(names) or "" in names:
                raise DataError("the header has an empty or repeated column name", where=f"{path}, line 1",
                                found=", ".join(names), expected="a different name for every column",
                                fix="mend the header")
            while True:
                line = reader.line_num + 1
                values = next(reader, None)
                if values is None:
                    return
                if len(values) not in (0, len(names)):
                    raise DataError("a row has the wrong number of fields", where=f"{path}, line {line}",
                                    found=f"{len(values)} fields", expected=f"{len(names)}: {', '.join(names)}",
                                    fix="quote fields that hold the separator, a quote or a line break")
                if values:
                    yield dict(zip(names, values, strict=True)), f"{path}, line {line}"
    except UnicodeDecodeError:
        _text(path)  # says where
        raise
    except csv.Error as error:
        raise DataError("a row cannot be parsed", where=f"{path}, line {line}", found=str(error),
                        expected='fields in "double quotes", quotes inside them doubled',
                        fix="look for a quote that is never closed") from error
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield ArrowRow(row), f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        raise DataError("the file is not readable Parquet", where=str(path), found=str(error),
                        expected="a complete Parquet file", fix="write or download it again") from error


def _plain(path: Path) -> Iterator[Row]:
    yield {"text": _text(path)}, f"{path}, line 1"


PARSERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines,
    ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".txt": _plain,
}
