"""From any source to conversations, in one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gazelle.data.conversation import Conversation
from gazelle.data.formats import detect_format, to_conversations, unused_columns
from gazelle.data.formatting import FormattingFunc
from gazelle.data.read import read_rows

if TYPE_CHECKING:
    from gazelle.data.holdout import HeldOut


@dataclass(frozen=True)
class Loaded:
    """Conversations, the source they were read from, the format they had, and the columns that it does not use.

    Attributes:
        held_out: how they were split, if these are a part of the source.
    """

    conversations: list[Conversation]
    source: str
    format: str
    unused: tuple[str, ...] = ()
    held_out: "HeldOut | None" = None


def load_conversations(
    source: Any, *, format: str = "auto", columns: Mapping[str, str] | None = None, split: str = "train",  # noqa: A002
    system: str | None = None, formatting_func: FormattingFunc | None = None, text_column: str | None = None,
    token: str | None = None,
) -> Loaded:
    """Read `source` and bring its rows to conversations: `read_rows` and `to_conversations` in a row.

    Their pages explain the arguments and the errors. What was loaded before is returned as it is. A `text_column` that
    is named and there makes the format "text": scripts render such a column beside the columns it was made from.
    """
    if isinstance(source, Loaded):
        return source
    rows = read_rows(source, split=split, token=token)
    name = format
    if formatting_func is not None:
        name = "formatting_func"
    elif format == "auto":
        named = text_column is not None and text_column in rows[0][0]
        name = "text" if named else detect_format(rows, columns)
    if name == "text" and text_column not in (None, "text"):
        columns = {**(columns or {}), "text": text_column}
    conversations = to_conversations(rows, format=name, columns=columns, system=system,
                                     formatting_func=formatting_func)
    unused = unused_columns(rows, name, columns) if formatting_func is None else ()
    return Loaded(conversations, rows.source, name, unused)
