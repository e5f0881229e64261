"""Rows of any known format to conversations.

A format is known by its columns. `FORMATS` is in order of preference, for rows that fit more than one: a structured
column is worth more than a "text" column beside it, which is usually the same thing already rendered.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.data.conversation import Conversation, Turn
from gazelle.data.formatting import FormattingFunc, format_rows
from gazelle.data.parse import ArrowRow, Row
from gazelle.data.turns import json_list, text_of, turns_of

Cells = Mapping[str, Any]  # canonical column name -> value


@dataclass(frozen=True)
class Format:
    """The columns a format has, and how to read them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Cells, str], list[Turn]]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns the format looks at."""
        return (*self.required, *self.optional, "system", "tools")


def _messages(cells: Cells, where: str) -> list[Turn]:
    return turns_of(cells["messages"], "messages", where)


def _sharegpt(cells: Cells, where: str) -> list[Turn]:
    return turns_of(cells["conversations"], "conversations", where)


def _alpaca(cells: Cells, where: str) -> list[Turn]:
    turns = []
    for pair in cells.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("'history' is not a list of pairs", where=where, found=repr(pair),
                            expected='[["question", "answer"], ...]', fix="mend the row")
        turns += [Turn("user", text_of(pair[0], "history", where)),
                  Turn("assistant", text_of(pair[1], "history", where))]
    extra = text_of(cells.get("input"), "input", where, optional=True)
    instruction = text_of(cells["instruction"], "instruction", where)
    return [*turns, Turn("user", instruction + (f"\n\n{extra}" if extra.strip() else "")),
            Turn("assistant", text_of(cells["output"], "output", where))]


def _prompt_completion(cells: Cells, where: str) -> list[Turn]:
    prompt, completion = cells["prompt"], cells["completion"]
    before = (turns_of(prompt, "prompt", where) if is_messages(prompt)
              else [Turn("user", text_of(prompt, "prompt", where))])
    after = (turns_of(completion, "completion", where) if is_messages(completion)
             else [Turn("assistant", text_of(completion, "completion", where))])
    # An assistant turn inside the prompt is an example to look at, not one to learn.
    return [Turn(turn.role, turn.content, turn.extra, train=False) for turn in before] + after


def is_messages(value: Any) -> bool:
    """True for a list, and for a JSON string of one that begins with a message: other JSON arrays are ordinary texts,
    such as the answers of extraction data."""
    if not isinstance(value, str):
        return isinstance(value, list | tuple)
    text = value.lstrip()
    if not text.startswith("["):
        return False
    text = text[1:].lstrip()
    try:
        first, _ = json.JSONDecoder().raw_decode(text) if text.startswith("{") else ({}, 0)
    except (json.JSONDecodeError, RecursionError):
        return False
    return "role" in first or {"from", "value"} <= first.keys()


def _question_answer(cells: Cells, where: str) -> list[Turn]:
    question = text_of(cells["question"], "question", where)
    context = text_of(cells.get("context"), "context", where, optional=True)
    return [Turn("user", question + (f"\n\n{context}" if context.strip() else "")),
            Turn("assistant", text_of(cells["answer"], "answer", where))]


FORMATS = {
    "messages": Format(("messages",), (), _messages),
    "sharegpt": Format(("conversations",), (), _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "history"), _alpaca),
    "prompt-completion": Format(("prompt", "completion"), (), _prompt_completion),
    "question-answer": Format(("question", "answer"), ("context",), _question_answer),
    "text": Format(("text",), (), lambda _cells, _where: []),
}
ALIASES = {"conversations": ("conversation",), "input": ("context",), "output": ("response",),
           "completion": ("response",), "question": ("query",), "answer": ("response",), "system": ("system_prompt",)}


def to_conversations(
    rows: Sequence[Row], *, format: str = "auto", columns: Mapping[str, str] | None = None,  # noqa: A002
    system: str | None = None, formatting_func: FormattingFunc | None = None,
) -> list[Conversation]:
    """Bring rows of one format to conversations.

    An "input" beside an instruction and a "context" beside a question follow it after an empty line.

    Args:
        rows: pairs of a row and where it was read, as from `read_rows`.
        format: "alpaca", "sharegpt", "messages", "prompt-completion", "question-answer" or "text"; "auto" tells it
            from the columns.
        columns: the format's column name -> the name it has in these rows, such as {"instruction": "frage"}.
        system: a system turn for rows that have none; not for texts.
        formatting_func: makes the text to train on from a row (or, given columns of lists, from many at once);
            overrides `format`.

    Raises:
        OptionError: an unknown format or column name, or `system` for texts.
        DataError: rows of different formats, or rows that cannot be used; it shows the first and counts the rest.
    """
    chosen = columns or {}
    name = format
    if formatting_func is not None:
        name = "text"
    elif format == "auto":
        name = detect_format(rows, chosen)
    if system and name == "text":
        raise OptionError("a text has no system prompt", where="system", found=system, expected="rows with turns",
                          fix="leave system out, or write it into the texts")
    if formatting_func is not None:
        return [Conversation((), where, text=text) for text, where in format_rows(rows, formatting_func)]
    _check_columns(rows, chosen)
    if name not in FORMATS:
        raise OptionError(f"unknown format {name!r}", where="format", found=name,
                          expected="auto, " + ", ".join(FORMATS), fix=nearest(name, [*FORMATS, "auto"]))
    conversations, bad = [], []
    for row, where in rows:
        try:
            conversations.append(_conversation(FORMATS[name], row, where, chosen, system))
        except DataError as error:
            bad.append(error)
    if bad:
        many = f" ({len(bad)} of {len(rows)} rows cannot be used; this is the first)" if len(bad) > 1 else ""
        raise DataError(bad[0].what + many, where=bad[0].where, found=bad[0].found, expected=bad[0].expected,
                        fix=bad[0].fix) from bad[0]
    return conversations


def detect_format(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """The format all rows have, told from their column names.

    Raises:
        OptionError: `columns` names a column that no format has.
        DataError: no known format, or a row of another format than the first.
    """
    chosen = columns or {}
    _check_columns(rows, chosen)
    known: dict[frozenset[str], str | None] = {}
    first = None
    for row, where in rows:
        keys = frozenset(row)
        if keys not in known:
            known[keys] = next((name for name, form in FORMATS.items()
                                if chosen.keys() <= set(form.columns) and _resolve(form, keys, chosen)), None)
        found = known[keys]
        if found is None and first is None:
            formats = "; ".join(f"{name} ({', '.join(form.required)})" for name, form in FORMATS.items())
            raise DataError("the columns fit no known format", where=where, found=", ".join(row), expected=formats,
                            fix='say which column is which, for example columns={"question": "q", "answer": "a"}')
        if first is None:
            first, first_row = found, row
        elif found != first:
            raise DataError("rows have different formats", where=where, found=f"{found or 'no known format'}: "
                            + ", ".join(row), expected=f"{first}, as in the first row: " + ", ".join(first_row),
                            fix="split the data into one source a format, or give the rows the same columns")
    if first is None:
        raise DataError("there are no rows", where="data", found="0 rows", expected="at least one row",
                        fix="check the source")
    return first


def unused_columns(rows: Sequence[Row], format: str,  # noqa: A002
                   columns: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The columns that `to_conversations` does not look at when it reads `rows` as `format`, in order."""
    form = FORMATS[format]
    used: dict[tuple[str, ...], list[str]] = {}
    unused: dict[str, None] = {}
    for row, _ in rows:
        if (keys := tuple(row)) not in used:
            found = _resolve(form, keys, columns or {}) or {}
            used[keys] = [name for column, name in found.items() if format != "text" or column == "text"]
            unused |= dict.fromkeys(name for name in keys if name not in used[keys])
    return tuple(unused)


def _check_columns(rows: Sequence[Row], chosen: Mapping[str, str]) -> None:
    canonical = {column for form in FORMATS.values() for column in form.columns}
    present = {name for row, _ in rows for name in row} if chosen else set()
    for column, name in chosen.items():
        if column not in canonical:
            raise OptionError(f"no format has a column {column!r}", where="columns", found=column,
                              expected=", ".join(sorted(canonical)), fix=nearest(column, canonical))
        if name not in present:
            raise DataError(f"there is no column {name!r}", where=f"columns, {column}", found=name,
                            expected=", ".join(sorted(present)), fix=nearest(name, present))


def _resolve(form: Format, keys: Iterable[str], chosen: Mapping[str, str]) -> dict[str, str] | None:
    """Canonical column -> its name in a row with these keys; None if a required one is missing."""
    present, found = set(keys), {}
    for column in form.columns:
        names = (chosen[column],) if column in chosen else (column, *ALIASES.get(column, ()))
        name = next((name for name in names if name in present), None)
        if name is not None:
            found[column] = name
        elif column in form.required:
            return None
    return found


def _conversation(form: Format, row: Mapping[str, Any], where: str, chosen: Mapping[str, str],
                  system: str | None) -> Conversation:
    names = _resolve(form, row, chosen)
    if names is None:
        raise DataError("a column is missing", where=where, found=", ".join(row), expected=", ".join(form.required),
                        fix='say which column is which, for example columns={"question": "q", "answer": "a"}')
    tidy = _without_nulls if isinstance(row, ArrowRow) else lambda value: value
    cells = {column: tidy(row[name]) for column, name in names.items()}
    if form is FORMATS["text"]:
        return Conversation((), where, text=text_of(cells["text"], names["text"], where))
    turns = form.parse(cells, where)
    prompt = text_of(cells.get("system"), "system", where, optional=True) or system
    if prompt and turns[0].role != "system":
        turns.insert(0, Turn("system", prompt))
    _check_turns(turns, where)
    return Conversation(tuple(turns), where, tuple(json_list(cells.get("tools"), "tools", where)))


def _without_nulls(value: Any) -> Any:
    """`value` without the fields that are None, at any depth; a None in a list stays."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _check_turns(turns: Sequence[Turn], where: str) -> None:
    """Refuse what no chat template renders. Which other orders are fine, the template itself decides."""
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise DataError("a system message is not the first", where=where, found=", ".join(roles),
                        expected="at most one system message, before all others",
                        fix="join the system messages at the start of the row")
    if not any(turn.labelled for turn in turns):
        raise DataError("there is no assistant message to learn from", where=where, found=", ".join(roles),
                        expected="at least one assistant message whose weight is not 0", fix="remove the row")
