"""Ways that a model is in for a while: evaluation, inputs without a gradient, weights in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
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


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """16-bit weights as float32 while it lasts, in which a CPU computes many times faster; afterwards as they were."""
    half = (torch.bfloat16, torch.float16)
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in half]
    for tensor, data in kept:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
