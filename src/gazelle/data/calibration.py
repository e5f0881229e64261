"""Token ids on which a quantiser sees what a model's layers are fed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gazelle.base.errors import OptionError
from gazelle.data.encode import encode
from gazelle.data.load import Loaded, load_conversations

if TYPE_CHECKING:
    from torch import Tensor

_Item = TypeVar("_Item")


def calibration_ids(data: Any, tokenizer: Any, *, rows: int = 128, length: int = 512) -> "list[Tensor]":
    """Rows of ids, conversations rendered with the chat template as in training. The same data gives the same ids.

    Args:
        data: whatever `read_rows` takes, in any format that is known by its columns.
        tokenizer: fast, with an EOS token, and with a chat template unless all rows are texts.
        rows: at most so many, spread evenly over the data.
        length: tokens of a row at most. Longer conversations are cut, longer texts give several rows.

    Returns:
        [T] int64 each, T from 2 to `length`.

    Raises:
        OptionError: no data, or a number out of range.
        DataError, ModelError: as `read_rows` and `encode`.
    """
    import torch

    if data is None:
        raise OptionError("there is nothing to calibrate with", where="calibration", found="no data",
                          expected="a file, folder, list of rows, data set or hub name like the training data",
                          fix='pass calibration="train.jsonl", or whatever the model was trained on')
    for name, value, least in (("rows", rows, 1), ("length", length, 2)):
        if value < least:
            raise OptionError("a value out of range", where=name, found=value, expected=f"at least {least}",
                              fix=f"change {name}")
    chosen = _spread(load_conversations(data).conversations, rows)
    encoded = encode(chosen, tokenizer, max_length=length, train_on="all")
    return [torch.tensor(example.input_ids, dtype=torch.int64) for example in _spread(encoded.examples, rows)]


def source_name(data: Any) -> str:
    """What to call `data` beside an export, without the folders of this machine."""
    source = data.source if isinstance(data, Loaded) else data
    if isinstance(source, str | Path):
        return Path(source).name if Path(source).expanduser().exists() else str(source)
    return type(source).__name__


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """`count` of them, evenly apart, or all if they are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
