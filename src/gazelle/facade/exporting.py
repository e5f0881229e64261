"""Exporting from what a user has at hand: a folder, or a model without its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError, nearest
from gazelle.base.files import check_writable
from gazelle.models.checkpoint import find_checkpoint
from gazelle.models.load import load_model, load_tokenizer
from gazelle.models.record import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("gguf",)


def export_checkpoint(model_name: str, to: str, output: Path | None = None) -> list[Path]:
    """Write a model in another format.

    A model that lies in its files as it is to be read is mapped from there instead of being loaded. An adapter goes
    onto its base as that was kept in training.

    Args:
        model_name: folder with an adapter or a model, hub name or GGUF file.
        to: the format and, behind a colon, ways of quantising, such as "gguf:q4_k_m,q8_0".
        output: folder; left out: the model's own name and "-gguf", beside it, or for a hub name here.

    Returns:
        The files.

    Raises:
        UserError: before the model is loaded, for options and a folder that cannot be written to.
    """
    from gazelle.export.gguf import export_gguf
    from gazelle.export.gguf_recipe import find_recipes

    kind, _, methods = to.partition(":")
    if (kind := kind.strip().lower()) not in FORMATS:
        raise OptionError("there is no such format to export to", where="--to", found=to,
                          expected="gguf:METHOD, or several METHODs with commas between them",
                          fix=nearest(kind, FORMATS))
    methods = methods or "q8_0"
    find_recipes(methods, where="--to")
    path = Path(model_name).expanduser()
    local = Path(path.name).absolute()
    if path.exists():  # beside a link, not beside what it leads to
        local = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    target = output or local.with_name(f"{local.name.removesuffix('.gguf')}-gguf")
    check_writable(target.absolute())
    checkpoint = find_checkpoint(model_name)
    recorded = checkpoint.adapter is not None and "load_in_4bit" in read_record(checkpoint.folder)
    model, tokenizer = load_model(model_name, load_in_4bit=None if recorded else False, dtype="auto",
                                  device_map="cpu", is_trainable=False)
    return export_gguf(model, tokenizer, target, methods)


def loaded_tokenizer(model: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer of the checkpoint that `model` was loaded from.

    Raises:
        OptionError: it is not known, or tokens were added since.
    """
    name = getattr(unwrap(model).config, "_name_or_path", "")
    if not name:
        raise OptionError("the model does not know its tokenizer", where="tokenizer", found="none",
                          expected="the model's tokenizer", fix="pass tokenizer=")
    tokenizer, _ = load_tokenizer(name)
    used = getattr(unwrap(model), "tokens_in_use", len(tokenizer))
    if used != len(tokenizer):
        raise OptionError("tokens were added to the model's tokenizer", where="tokenizer", found=f"{used:,} tokens",
                          expected=f"{len(tokenizer):,}, those of {name}", fix="pass tokenizer=")
    return tokenizer
