"""Ctrl-C and SIGTERM while training: the step is finished, a checkpoint saved, and the process ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from gazelle.base.log import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Training was stopped by a signal and saved. Exit code 128 + the signal's number: 130 Ctrl-C, 143 SIGTERM."""

    def __init__(self, caught: int) -> None:
        super().__init__(128 + caught)


class Interruption(TrainerCallback):
    """Asks the run to save and stop once a signal came. A second one is treated as if this class were not there.

    Attributes:
        caught: the signal's number, or None.
        stopping: the run has been asked to stop for it.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.stopping = False
        self._group: Any = None

    @contextlib.contextmanager
    def watching(self, processes: int) -> Iterator[None]:
        """Handlers are ours while it lasts, in the main thread; elsewhere signals do what they did."""
        self.caught, self.stopping = None, False
        if processes > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the host, so that no step waits for a GPU
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        self._before = before
        try:
            yield
        finally:
            _restore(before)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """The one place between two steps."""
        self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation may have taken long: do not wait for another step. All processes come here too."""
        self._stop(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """The base class takes the stop for the end of an epoch; what it does at one would be done twice."""
        if self.stopping:
            control.should_evaluate = control.should_save = control.should_log = False
        else:
            self._stop(control)  # a signal since the last step, behind which there may be no other

    def _stop(self, control: TrainerControl) -> None:
        if self._group is not None:  # processes hear of it in different steps
            heard = torch.tensor(self.caught or 0)
            dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._group)
            self.caught = int(heard) or None
        if self.caught is not None:
            self.stopping = control.should_save = control.should_training_stop = True

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught is None:
            self.caught = number
            logger.warning("%s: saving after this step. Once more to stop at once, without saving.",
                           signal.Signals(number).name)
            return
        _restore(self._before)
        signal.raise_signal(number)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # One that was not set from Python is told as None, and cannot be set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
