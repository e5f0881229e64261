"""From any source to examples, in one call."""

from collections.abc import Mapping
from typing import Any

from gazelle.data.encode import Encoded, encode
from gazelle.data.formats import detect_format, to_conversations
from gazelle.data.formatting import FormattingFunc
from gazelle.data.read import read_rows


def load_data(
    source: Any, tokenizer: Any, *, max_length: int, format: str = "auto",  # noqa: A002
    columns: Mapping[str, str] | None = None, split: str = "train", system: str | None = None,
    train_on: str = "responses", formatting_func: FormattingFunc | None = None, text_column: str = "text",
    token: str | None = None,
) -> Encoded:
    """Read `source`, tell its format, and encode it: `read_rows`, `to_conversations` and `encode` in a row.

    Their pages explain the arguments and the errors.
    """
    rows = read_rows(source, split=split, token=token)
    if formatting_func is not None:
        format = "formatting_func"  # noqa: A001
    elif format == "auto":
        chosen = {"text": text_column} if text_column != "text" else {}
        format = detect_format(rows, {**(columns or {}), **chosen})  # noqa: A001
    conversations = to_conversations(rows, format=format, columns=columns, system=system,
                                     formatting_func=formatting_func, text_column=text_column)
    return encode(conversations, tokenizer, max_length=max_length, train_on=train_on, source=rows.source, format=format)
