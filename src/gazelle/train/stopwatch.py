"""How long training takes a token, without the first steps, in which kernels are compiled."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

WARM_UP = 4  # optimizer steps


class Stopwatch(TrainerCallback):
    """Waits for the device twice: after the warm-up, and at the end.

    Args:
        device: that is trained on.
        tokens: tokens trained so far.
        apart: seconds so far that were not training.
    """

    def __init__(self, device: torch.device, tokens: Callable[[], int], apart: Callable[[], float]) -> None:
        self.device, self.tokens, self.apart = device, tokens, apart
        self.seconds_a_token: float | None = None
        self._steps = 0
        self._mark: tuple[float, int, float] | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start anew."""
        self.seconds_a_token, self._steps, self._mark = None, 0, None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The warm-up is over."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._mark = self._now()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Read the clock."""
        if self._mark is None or self._steps == WARM_UP:
            return
        (began, tokens, apart), (now, all_tokens, all_apart) = self._mark, self._now()
        self.seconds_a_token = (now - began - (all_apart - apart)) / max(1, all_tokens - tokens)

    def _now(self) -> tuple[float, int, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), self.tokens(), self.apart()
