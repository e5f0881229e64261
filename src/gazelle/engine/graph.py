"""Forward and backward pass of a micro-batch as one CUDA graph: one launch instead of thousands.

A graph replays kernels on the memory they were recorded with. So inputs are copied to where they were, gradients are
added where they lay, and a batch has to have the shape of one that was recorded.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gazelle.base.log import logger

WARM_UP = 2  # runs of a shape before it is recorded: kernels are compiled and tuned in the first
MOST_SHAPES = 12  # recorded at a time; each keeps its activations' memory


class StepGraph:
    """Runs `step`, recorded where that is possible.

    Args:
        step: from tensors by name, and what of the batch is no tensor, to the loss. It adds gradients to buffers that
            stay where they are, and must not wait for the device.
    """

    def __init__(self, step: Callable[[dict[str, Tensor], tuple], Tensor]) -> None:
        self._step = step
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        self._pool: Any = None
        self.reason: str | None = None
        self.replayed = 0

    def __call__(self, batch: dict[str, Tensor], static: tuple = ()) -> Tensor:
        """The loss of a batch.

        Args:
            batch: tensors by name.
            static: what else the step depends on; a graph is good for one value of it.
        """
        key = static, *((name, tuple(tensor.shape)) for name, tensor in batch.items())
        if (recorded := self._recorded.get(key)) is not None:
            graph, inputs, loss = recorded
            for name, tensor in batch.items():
                inputs[name].copy_(tensor, non_blocking=True)
            graph.replay()
            self.replayed += 1
            return loss.clone()
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if self.reason is not None or seen <= WARM_UP or len(self._recorded) >= MOST_SHAPES:
            return self._step(batch, static)
        return self._record(key, batch, static)

    def _record(self, key: tuple, batch: dict[str, Tensor], static: tuple) -> Tensor:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        computing = torch.cuda.current_stream()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                loss = self._step(inputs, static)
        except RuntimeError as error:
            cause: BaseException = error
            if torch.cuda.current_stream() != computing:
                _end_failed_capture(computing, self._pool)
                cause = error.__context__ or error  # to end a failed capture raises an error that only says so
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.reason = str(cause).splitlines()[0]
            logger.info("Steps are not recorded as CUDA graphs: %s", self.reason)
            torch.cuda.synchronize()
            return self._step(batch, static)
        self._recorded[key] = graph, inputs, loss
        graph.replay()  # recording runs nothing
        self.replayed += 1
        return loss.clone()

    def clear(self) -> None:
        """Forget what was recorded, and give its memory back."""
        self._recorded.clear()
        self._seen.clear()
        self._pool = None


def _end_failed_capture(computing: torch.cuda.Stream, pool: Any) -> None:
    """Undo what torch leaves as it was if a capture fails: stream, allocator and generator stay those of the capture,
    and the next random number, or the next time that memory runs short, would raise."""
    torch.cuda.set_stream(computing)
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(computing.device_index, pool)
        torch._C._cuda_releasePool(computing.device_index, pool)
    generator = torch.cuda.default_generators[computing.device_index]
    generator.graphsafe_set_state(generator.clone_state())
