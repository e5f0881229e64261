"""Saving a model object in any of its ways, also without its tokenizer at hand."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError, nearest
from gazelle.models.load import load_tokenizer
from gazelle.models.save import METHODS, QUANTISED, save_merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gazelle.models.saved import SaveReport


def save_checkpoint(model: Any, tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path,
                    save_method: str = "merged_16bit", **options: Any) -> "SaveReport":
    """`save_merged` or `save_quantised`, whichever has the method.

    Raises:
        OptionError: an unknown method, or an option that it does not have.
    """
    check_method(save_method, options)
    if save_method not in QUANTISED:
        return save_merged(model, tokenizer, folder, save_method=save_method, **options)
    from gazelle.export.quantised import save_quantised

    if tokenizer is None and save_method != "fp8":
        tokenizer = loaded_tokenizer(model)
    return save_quantised(model, tokenizer, folder, save_method, **options)


def check_method(save_method: str, options: dict[str, Any]) -> None:
    """Raise `OptionError` for an unknown method, or an option that it does not have."""
    methods = (*METHODS, *QUANTISED)
    if save_method not in methods:
        raise OptionError("no such way to save a model", where="save_method", found=save_method,
                          expected=", ".join(methods), fix=nearest(str(save_method), methods))
    function: Callable[..., Any] = save_merged
    if save_method in QUANTISED:
        from gazelle.export.quantised import save_quantised

        function = save_quantised
    known = {name for name, parameter in inspect.signature(function).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY}
    if unknown := sorted(options.keys() - known):
        raise OptionError("unknown option for saving a model in this way", where="save_pretrained_merged",
                          found=unknown[0], expected=", ".join(sorted(known)), fix=nearest(unknown[0], known))


def loaded_tokenizer(model: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer that came with `model`, with the template that training gave it; else its base's.

    Raises:
        OptionError: it is not known, or has other tokens than the model.
    """
    base = unwrap(model)
    name = getattr(base.config, "_name_or_path", "")
    tokenizer = getattr(base, "gazelle_tokenizer", None)
    if tokenizer is None and not name:
        raise OptionError("the model does not know its tokenizer", where="tokenizer", found="none",
                          expected="the model's tokenizer", fix="pass tokenizer=")
    if tokenizer is None:
        tokenizer, _ = load_tokenizer(name)
    used = getattr(base, "tokens_in_use", len(tokenizer))
    if used != len(tokenizer):
        raise OptionError("tokens were added to the model's tokenizer", where="tokenizer", found=f"{used:,} tokens",
                          expected=f"{len(tokenizer):,}, those of {name}", fix="pass tokenizer=")
    return tokenizer
