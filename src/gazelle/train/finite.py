"""Gradients that are not finite, under fp8 or fp16: the layer is named, the step skipped and counted."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gazelle.base.errors import TrainingError
from gazelle.base.log import logger

MOST = {"fp8": 3, "fp16": 25}  # skipped in a row; float16's loss scale halves at each until gradients fit


class FiniteGradients(TrainerCallback):
    """Looks at every gradient before the optimizer does.

    Args:
        precision: "fp8" or "fp16".
        scaled: a gradient scaler skips the step by itself.

    Raises:
        TrainingError: too many steps were skipped in a row.
    """

    def __init__(self, precision: str, *, scaled: bool) -> None:
        self.precision, self.scaled = precision, scaled
        self.skipped = self.in_a_row = 0
        self.names: list[str] = []
        self._found: list[str] | None = None

    def look(self, model: Any) -> None:
        """Note which gradients are not finite, before clipping spreads that to all of them."""
        trained = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
        self._found = [trained[number][0] for number in not_finite([grad for _, grad in trained])]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip the step if a gradient is not finite."""
        if self._found is None:
            self.look(kwargs["model"])
        found, self._found = self._found, None
        if not found:
            self.in_a_row = 0
            return
        self.names = found
        self.skipped += 1
        self.in_a_row += 1
        logger.warning("Step %d is skipped: the gradient of %s is not finite%s.", state.global_step + 1, found[0],
                       f", nor are those of {len(found) - 1} others" if found[1:] else "")
        if self.in_a_row >= MOST[self.precision]:
            raise TrainingError(
                f"gradients were not finite in {self.in_a_row} steps in a row", where=self.names[0],
                found=f"precision {self.precision}, learning rate {args.learning_rate:g}", expected="finite gradients",
                fix='lower learning_rate or max_grad_norm, or train with precision="bf16"')
        if not self.scaled:
            for group in kwargs["optimizer"].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # an optimizer leaves such parameters alone


def not_finite(grads: list[Tensor]) -> list[int]:
    """Numbers of the gradients that hold an infinity or no number. Waits for the device."""
    if not grads:
        return []
    largest = torch.stack(torch._foreach_norm(grads, float("inf")))  # a sum of squares could overflow
    return (~largest.isfinite()).nonzero().flatten().tolist()
