"""`transformers.TrainingArguments` under the names that earlier releases of it took, for scripts that use them."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import transformers

from gazelle.base.device import default_device
from gazelle.base.exchange import exchange
from gazelle.train.config import current_names, fit_to_cpu


class OlderTrainingArguments(transformers.TrainingArguments):
    """As transformers', defaults included; takes older names, and on a CPU does without what needs a GPU.

    Raises:
        OptionError: for a name nobody knows (with the nearest one).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **current_names(kwargs, _NAMES))

    def __post_init__(self) -> None:
        if default_device() == "cpu":
            fit_to_cpu(self)
        super().__post_init__()


OlderTrainingArguments.__name__ = OlderTrainingArguments.__qualname__ = "TrainingArguments"
_NAMES = frozenset(option.name for option in dataclasses.fields(transformers.TrainingArguments) if option.init)


@contextlib.contextmanager
def older_names() -> Iterator[None]:
    """While it lasts, `from transformers import TrainingArguments` gets the class above."""
    with contextlib.ExitStack() as stack:
        # Imported anew: transformers puts another module in its own place while it loads.
        exchange(stack, importlib.import_module("transformers"), "TrainingArguments", lambda _: OlderTrainingArguments)
        yield
