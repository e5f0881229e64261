"""What every format asks of a model and of the place to write to, before long work."""

from pathlib import Path
from typing import Any

from gazelle.base.errors import ModelError, OutputError


def check_no_folder(path: Path) -> None:
    """Raise `OutputError` if a folder has the name of the file that is to be written."""
    if path.is_dir():
        raise OutputError("a folder has the name of the file", where=str(path), found="a folder",
                          expected="a file, or nothing", fix="move it away, or export to another folder")


def text_config(base: Any) -> Any:
    """The config of a causal model.

    Raises:
        ModelError: a model with a language model inside.
    """
    if base.config.get_text_config() is not base.config:
        raise ModelError("only models of text alone can be exported to this format", where=type(base).__name__,
                         found="a language model inside another model", expected="a causal language model",
                         fix="load its text part, AutoModelForCausalLM with config.text_config, and export that")
    return base.config
