"""Calls that scripts make and that have another name in gazelle."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.base.log import say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`: the loss counts every labelled token of an accumulated batch once, in any trainer here."""
    return trainer.train(*args, **kwargs)


def add_new_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase", new_tokens: Sequence[str],
                   method: str = "mean", interpolation: float = 0.5) -> int:  # noqa: ARG001
    """Add tokens to a tokenizer and rows for them to the model; returns how many were new.

    Args:
        model: before or after `get_peft_model`; the new rows are trained and saved with the adapter.
        tokenizer: the model's.
        new_tokens: those known already are left as they are.
        method: "mean"; the rows start as the mean of all others whatever is asked for.
        interpolation: has no meaning for the mean.
    """
    if method != "mean":
        say_once(f"add_new_tokens(method={method!r}): new rows start as the mean of all others")
    added = tokenizer.add_tokens(list(new_tokens))
    resize_token_embeddings(model, len(tokenizer))
    return added
