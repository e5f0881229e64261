"""A user's own function from rows to texts, as TRL and Unsloth scripts pass it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gazelle.base.errors import DataError
from gazelle.base.log import logger
from gazelle.data.parse import Row
from gazelle.data.turns import text_of

FormattingFunc = Callable[[Any], Any]
_BATCH = 1000


def format_rows(rows: Sequence[Row], function: FormattingFunc) -> Iterator[tuple[str, str]]:
    """The text `function` makes of every row, with where the row was read.

    Both styles in use are taken: a row in and a text (or a list of one text) out, or a dict of column lists in and a
    list of texts out. Which it is shows on the first rows.

    Raises:
        DataError: the function fails, or returns something else or an empty text.
    """
    batched = len(rows) > 0 and _takes_batches(rows, function)
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        texts = _batch(function, part) if batched else [_single(function, row, where) for row, where in part]
        if not isinstance(texts, list) or len(texts) != len(part):
            raise DataError("formatting_func does not return one text a row", where=part[0][1], found=repr(texts),
                            expected=f"a list of {len(part)} texts", fix="return a text for every row")
        for text, (_, where) in zip(texts, part, strict=True):
            yield text_of(text, "formatting_func", where), where


def _takes_batches(rows: Sequence[Row], function: FormattingFunc) -> bool:
    """True if two rows as columns give two texts. A function of one row gives one text, or fails on lists."""
    pair = [rows[0], rows[min(1, len(rows) - 1)]]
    try:
        texts = function(_columns(pair))
    except Exception as error:  # noqa: BLE001  the user's function, called in a way it may not be written for
        logger.debug("formatting_func does not take a batch: %r", error)
        return False
    return isinstance(texts, list) and len(texts) == len(pair)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = {name: None for row, _ in rows for name in row}
    return {name: [row.get(name) for row, _ in rows] for name in names}


def _batch(function: FormattingFunc, part: Sequence[Row]) -> Any:
    try:
        return function(_columns(part))
    except Exception as error:
        for row in part if len(part) > 1 else ():
            _batch(function, [row])  # the row it fails on says so itself
        raise _failed(error, part[0][1] if len(part) == 1 else f"{part[0][1]} to {part[-1][1]}") from error


def _failed(error: Exception, where: str) -> DataError:
    return DataError("formatting_func fails on this row", where=where, found=f"{type(error).__name__}: {error}",
                     expected="a text for every row", fix="mend the function or the row")


def _single(function: FormattingFunc, row: dict[str, Any], where: str) -> Any:
    try:
        result = function(row)
    except Exception as error:
        raise _failed(error, where) from error
    if isinstance(result, list) and len(result) != 1:
        raise DataError("formatting_func does not return one text a row", where=where, found=repr(result),
                        expected="one text", fix="return one text for a row, or a list of texts for a batch")
    return result[0] if isinstance(result, list) else result
