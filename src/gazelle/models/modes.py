"""Ways that a model is in for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from gazelle.adapters.unwrap import unwrap


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while it lasts; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen_inputs(model: Any) -> Iterator[None]:
    """While it lasts, what a frozen embedding gives wants no gradient. Adapters need none; `enable_input_require_grads`
    asks for it for the sake of reentrant checkpointing, and layers below the first adapter would be gone through again.
    """
    inner = unwrap(model)
    asked = bool(getattr(inner, "_require_grads_hooks", None))
    if asked:
        inner.disable_input_require_grads()
    try:
        yield
    finally:
        if asked:
            inner.enable_input_require_grads()
