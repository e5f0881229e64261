"""Attributes exchanged for the time of a block, and put back."""

import contextlib
from collections.abc import Callable
from typing import Any


def exchange(stack: contextlib.ExitStack, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    """Put another attribute in an object's place until the stack ends.

    Args:
        stack: that puts the old one back.
        owner: a module or class; what it inherits, it inherits again afterwards.
        name: of the attribute.
        around: from what was there (a `classmethod` as such, if it is the owner's own) to what is there now.
    """
    own = vars(owner).get(name)
    setattr(owner, name, around(getattr(owner, name) if own is None else own))
    if own is None:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, own)
