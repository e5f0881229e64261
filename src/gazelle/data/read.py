"""Where rows come from: a file, a folder, a list, a `datasets.Dataset` or a name on the Hugging Face hub."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from gazelle.base.errors import DataError, shorten
from gazelle.data.parse import PARSERS, ArrowRow, Row, parse_file, stream_file

# First word of a file name -> the split it holds: "train-00000-of-00001.parquet", "dev.jsonl".
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "eval": "validation"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows in order, each with where it was read ("data.jsonl, line 17"), and the name of the source as a whole."""

    items: Sequence[Row]
    source: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        return Rows(self.items[index], self.source) if isinstance(index, slice) else self.items[index]

    def split(self, fraction: float, *, seed: int) -> "tuple[Rows, Rows]":
        """The rows without a random `fraction` of them, and that fraction, both in their old order.

        Raises:
            DataError: one of the two would be empty.
        """
        count = round(len(self) * fraction)
        if not 0 < count < len(self):
            raise DataError("a fraction to hold out leaves nothing on one side", where=self.source,
                            found=f"eval_fraction {fraction} of {len(self)} rows",
                            expected="at least one row on each side",
                            fix="choose another eval_fraction (0 holds out nothing), or add rows")
        held = {int(index) for index in np.random.default_rng(seed).permutation(len(self))[:count]}
        kept = [row for index, row in enumerate(self.items) if index not in held]
        return Rows(kept, self.source), Rows([self.items[index] for index in sorted(held)], self.source)


def read_rows(source: Any, *, split: str = "train", token: str | None = None) -> Rows:
    """Read every row of `source`.

    Args:
        source: a path to a .json, .jsonl, .ndjson, .csv, .tsv, .parquet or .txt file (a .txt file is one row, with
            its whole text in the column "text"); a folder of such files, or one written by `Dataset.save_to_disk`; a
            list of dicts; a `datasets.Dataset` or `DatasetDict`; a hub name "owner/name" or "owner/name:config"; or
            rows already read.
        split: the part to read of a source that has parts: a `DatasetDict`, a hub name, or a folder with files named
            after them (train.jsonl, test-0001.parquet). "eval" is the test part if there is one, else the validation
            part. Any other source is read whole, a folder in order of its names.
        token: access token for private and gated data sets of the hub.

    Raises:
        DataError: nothing there, no such split, no rows, or something that cannot be parsed.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        rows = _read_named(source, split, token)
    elif isinstance(source, list | tuple):
        rows = Rows([(_mapping(row, f"row {number}"), f"row {number}") for number, row in enumerate(source, 1)], "list")
    else:
        rows = _read_dataset(source, split)
    if not rows:
        raise DataError("there are no rows", where=rows.source, found="0 rows", expected="at least one row",
                        fix="check that the source was written completely")
    return Rows([_without_nan(row) for row in rows], rows.source)


def stream_rows(source: Any, *, split: str = "train", token: str | None = None) -> Iterator[Row]:
    """The rows of `read_rows`, one at a time: those of files are read as they are asked for, so that a source may be
    larger than memory. Errors in a row come when it is reached."""
    if isinstance(source, str | Path) and (path := Path(source).expanduser()).exists() and not _is_saved(path):
        files = _folder_files(path, split) if path.is_dir() else [path]
        return (_without_nan(row) for rows in [stream_file(file) for file in files] for row in rows)
    return iter(read_rows(source, split=split, token=token))


def _without_nan(row: Row) -> Row:
    """Parquet and pandas write a missing text as the number NaN."""
    cells, where = row
    return type(cells)({name: None if _is_nan(value) else value for name, value in cells.items()}), where


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError("a row is not a dict", where=where, found=repr(row),
                        expected='a dict such as {"question": ..., "answer": ...}', fix="give every row column names")
    if any(isinstance(value, np.ndarray) for value in row.values()):
        # A table that pandas read from Parquet has arrays for lists, and structs as Arrow fills them.
        return ArrowRow({name: _lists(value) for name, value in row.items()})
    return dict(row)


def _lists(value: Any) -> Any:
    """`value` with lists for its arrays and None for NaN, at any depth."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if _is_nan(value):
        return None
    if isinstance(value, dict):
        return {name: _lists(entry) for name, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, list) else value


def _read_named(source: str | Path, split: str, token: str | None) -> Rows:
    path, name = Path(source).expanduser(), str(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a text passed in place of its file is too long for a name, for one
        raise DataError("this path cannot be looked up", where=shorten(name, 80), found=error.strerror or str(error),
                        expected="a file, a folder, or a hub name such as owner/name",
                        fix='check the path; for a text itself, pass rows: [{"text": ...}]') from error
    if is_folder:
        return _read_folder(path, split)
    if is_file:
        return Rows(parse_file(path), name)
    looks_like_path = isinstance(source, Path) or path.suffix.lower() in PARSERS or name.startswith((".", "/", "~"))
    if not looks_like_path and _HUB_NAME.fullmatch(name):
        return _read_hub(name, split, token)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    raise DataError("there is no such file", where=name, found=f"nothing at {path.absolute()}",
                    expected="a file, a folder, or a hub name such as owner/name",
                    fix=f"did you mean {str(path.parent / close[0])!r}?" if close else "check the path")


def _split_of(path: Path) -> str | None:
    return SPLITS.get(re.split(r"[-_.]", path.name.lower())[0])


def _present(split: str, present: Iterable[str]) -> str:
    """What "eval" means among these splits; any other name stands for itself."""
    return split if split != "eval" or split in present else "test" if "test" in present else "validation"


def _no_split(split: str, present: set[str], where: str) -> DataError:
    return DataError(f"there is no split {split!r}", where=where, found=split, expected=", ".join(sorted(present)),
                     fix="name one of these as split=")


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _read_folder(folder: Path, split: str) -> Rows:
    if _is_saved(folder):
        import datasets

        return _read_dataset(datasets.load_from_disk(str(folder)), split, str(folder))
    return Rows([row for path in _folder_files(folder, split) for row in parse_file(path)], str(folder))


def _folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that hold a split."""
    files = sorted(path for path in folder.iterdir()
                   if path.is_file() and path.suffix.lower() in PARSERS and not path.name.startswith("."))
    if not files:
        inside = sorted(path.name for path in folder.iterdir())[:5]
        raise DataError("the folder holds no data files", where=str(folder), found=", ".join(inside) or "nothing",
                        expected="files ending in " + ", ".join(PARSERS),
                        fix="name the folder that holds the files itself")
    if present := {found for path in files if (found := _split_of(path))}:
        wanted = _present(split, present) if split == "eval" else SPLITS.get(split, split)
        if wanted not in present:
            raise _no_split(split, present, str(folder))
        files = [path for path in files if _split_of(path) == wanted]
    return files


def _read_dataset(source: Any, split: str, name: str = "") -> Rows:
    import datasets

    if isinstance(source, datasets.DatasetDict):
        split = _present(split, set(source))
        if split not in source:
            raise _no_split(split, set(source), name or "DatasetDict")
        source = source[split]
    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError("a streamed data set has no length and cannot be checked before training",
                        where=type(source).__name__, found="streaming=True", expected="a data set held on disk",
                        fix="load it without streaming=True, or take a part: Dataset.from_list(list(data.take(10000)))")
    if not isinstance(source, datasets.Dataset):
        raise DataError("data cannot be read from this object", where=type(source).__name__, found=repr(source),
                        expected="a path, a hub name, a list of dicts or a datasets.Dataset",
                        fix="for a pandas table, pass table.to_dict('records')")
    rows = source.with_format(None).to_list()
    prefix = f"{name}, " if name else ""
    return Rows([(ArrowRow(row), f"{prefix}row {number}") for number, row in enumerate(rows, 1)], name or "Dataset")


def _read_hub(name: str, split: str, token: str | None) -> Rows:
    import datasets

    repository, _, config = name.partition(":")
    try:
        if split == "eval":
            split = _present(split, datasets.get_dataset_split_names(repository, config or None, token=token))
        found = datasets.load_dataset(repository, config or None, split=split, token=token)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        raise DataError("the data set could not be loaded from the Hugging Face hub", where=name, found=str(error),
                        expected=f"a data set {repository!r} with a split {split!r}; there is no such file here either",
                        fix="check the name, the connection and, if it is private, token=; or download the file and "
                            "give its path") from error
    return _read_dataset(found, split, name)
