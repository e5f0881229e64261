"""Rows into conversations as columns, under the names that scripts call for it."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.data.turns import turns_of

if TYPE_CHECKING:
    from datasets import Dataset

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_COLUMN = re.compile(r"\{([^{}]+)\}")


def standardize_sharegpt(dataset: Any, tokenizer: Any = None,  # noqa: ARG001
                         aliases_for_system: Sequence[str] = (), aliases_for_user: Sequence[str] = (),
                         aliases_for_assistant: Sequence[str] = (), batch_size: int = 1000,  # noqa: ARG001
                         num_proc: int | None = None) -> "Dataset":  # noqa: ARG001
    """The data set with its conversations as {"role", "content"} messages.

    Args:
        dataset: with a column "conversations" (or "messages") of {"from", "value"} or {"role", "content"}.
        tokenizer: taken because scripts pass it.
        aliases_for_system, aliases_for_user, aliases_for_assistant: names of roles beyond those known already.
        batch_size, num_proc: taken because scripts pass them.

    Raises:
        DataError: no such column, or a message that cannot be read, with the row it is in.
    """
    data = as_dataset(dataset)
    column = next((name for name in ("conversations", "messages", "conversation") if name in data.column_names), None)
    if column is None:
        raise DataError("there is no column of conversations", where="standardize_sharegpt",
                        found=", ".join(data.column_names), expected='"conversations" or "messages"',
                        fix="rename the column: dataset.rename_column(old, 'conversations')")
    others = {name: role for role, names in (("system", aliases_for_system), ("user", aliases_for_user),
                                             ("assistant", aliases_for_assistant)) for name in names}

    def standard(messages: Any, number: int) -> list[dict[str, Any]]:
        if others and isinstance(messages, list):
            messages = [{name: others.get(value, value) if name in ("role", "from") else value
                         for name, value in message.items()} for message in messages]
        return [{"role": turn.role, "content": turn.content, **turn.extra}
                for turn in turns_of(_without_none(messages), column, f"row {number}")]

    converted = [standard(messages, number) for number, messages in enumerate(data[column], 1)]
    return _with_column(data, column, converted)


def to_sharegpt(dataset: Any, merged_prompt: str = "", merged_column_name: str = "instruction",
                output_column_name: str = "output", remove_unused_columns: bool = True,
                conversation_extension: int = 1, random_state: int = 3407) -> "Dataset":
    """One question and one answer a row, made of columns; several random rows can be joined to a longer conversation.

    Args:
        dataset: a `datasets.Dataset` or a list of rows.
        merged_prompt: the question, such as "{instruction}[[\\nYour input is:\\n{input}]]". What stands in double
            brackets is left out of rows in which one of its columns is empty. Left out: the column
            `merged_column_name` as it is.
        merged_column_name: see there.
        output_column_name: the answer.
        remove_unused_columns: keep "conversations" alone.
        conversation_extension: rows a conversation is joined from: itself and random others.
        random_state: seed of the choice of those.

    Raises:
        OptionError: a column that is not there, or brackets that do not match.
    """
    data = as_dataset(dataset)
    names = data.column_names
    template = merged_prompt or "{" + merged_column_name + "}"
    if template.count("[[") != template.count("]]") or "[[" in _OPTIONAL.sub("", template):
        raise OptionError("double brackets that do not match", where="merged_prompt", found=template,
                          expected='"{instruction}[[\\n{input}]]"', fix="close every [[ with ]]")
    for name in [*_COLUMN.findall(template), output_column_name]:
        if name not in names:
            raise OptionError("there is no such column", where="to_sharegpt", found=name,
                              expected=", ".join(names), fix=nearest(name, names))
    if isinstance(conversation_extension, bool) or not 1 <= conversation_extension <= max(1, len(data)):
        raise OptionError("a conversation cannot be joined from so many rows", where="conversation_extension",
                          found=conversation_extension, expected=f"1 to {len(data)}", fix="leave it out for 1")

    def filled(part: str, row: Mapping[str, Any]) -> str:
        return _COLUMN.sub(lambda match: _text(row[match[1]]), part)

    def question(row: Mapping[str, Any]) -> str:
        def optional(match: re.Match[str]) -> str:
            return match[1] if all(_text(row[name]) for name in _COLUMN.findall(match[1])) else ""

        return filled(_OPTIONAL.sub(optional, template), row)

    pairs = [[{"from": "human", "value": question(row)}, {"from": "gpt", "value": _text(row[output_column_name])}]
             for row in data]
    random = np.random.default_rng(random_state)
    orders = [random.permutation(len(pairs)) for _ in range(conversation_extension - 1)]
    joined = [[*pair, *(message for order in orders for message in pairs[order[number]])]
              for number, pair in enumerate(pairs)]
    extended = _with_column(data, "conversations", joined)
    return extended.select_columns(["conversations"]) if remove_unused_columns else extended


def as_dataset(source: Any) -> "Dataset":
    """A `datasets.Dataset`, made of a list of rows if it is none.

    Raises:
        DataError: anything else, such as a whole DatasetDict.
    """
    import datasets

    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, list | tuple):
        return datasets.Dataset.from_list(list(source))
    raise DataError("one data set with all its rows is needed", where=type(source).__name__, found=repr(source),
                    expected="a datasets.Dataset, or a list of rows",
                    fix='name the split: load_dataset(name, split="train")')


def _with_column(data: "Dataset", name: str, values: list[Any]) -> "Dataset":
    import datasets

    made = datasets.Dataset.from_dict({name: values})
    kept = data.remove_columns(name) if name in data.column_names else data
    return datasets.concatenate_datasets([kept.flatten_indices(), made], axis=1) if kept.column_names else made


def _without_none(messages: Any) -> Any:
    """Arrow gives every message of a column the same fields."""
    return [{key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping)
            else message for message in messages] if isinstance(messages, list) else messages


def _text(value: Any) -> str:
    return "" if value is None else str(value)
