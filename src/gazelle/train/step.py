"""One micro-batch, forward and backward, recorded as a CUDA graph where launching its kernels would take longer than
running them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.log import say_once
from gazelle.engine.graph import StepGraph
from gazelle.models.head import has_fused_head
from gazelle.models.swap import Swapped, runs_on_engine, swapped_layers
from gazelle.train.config import SFTConfig
from gazelle.train.loss import batch_loss

_TENSORS = ("input_ids", "position_ids", "cu_seq_lens_q", "positions", "targets")
# Two floating-point operations a weight and token, forward and backward; beyond this many, kernels outlast launches.
LAUNCH_BOUND = 8e13


def refuses_graph(config: SFTConfig, model: Any, *, packed: bool, processes: int) -> str | None:
    """Why steps are not to be recorded, or None. An explicit `step_graph=True` that cannot be had is said."""
    if config.step_graph is False or str(config.step_graph).lower() == "false":
        return "step_graph is off"
    base = unwrap(model)
    reason = None
    if base.device.type != "cuda":
        reason = "CUDA graphs need a GPU"
    elif processes > 1:
        reason = "gradients are exchanged between processes"
    elif not packed or not runs_on_engine(base) or not has_fused_head(base):
        reason = "not every part of the model runs on the engine"
    elif config.fp16:
        reason = "float16 losses are scaled on the host"
    if reason is not None:
        if config.step_graph is True:
            say_once(f"steps are not recorded as CUDA graphs: {reason}")
        return reason
    if config.step_graph == "auto":
        longest = config.max_length or 2048
        work = 4.0 * base.num_parameters() * longest * config.per_device_train_batch_size
        if work > LAUNCH_BOUND:
            return "its kernels outlast their launches"
    return None


def uses_host(swapped: Swapped) -> bool:
    """True if a layer's input waits in host memory for its backward pass, or its weights come from there."""
    return swapped.home is not None or (swapped.keep is not None and swapped.keep.host)


class GraphedStep:
    """Forward and backward of packed batches, through a `StepGraph`.

    Args:
        model: what the batch is given to; its parameters' gradients stay where they are.
        label_smoothing: of the loss.
    """

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.graph = StepGraph(self._step)
        self._layers = swapped_layers(model)
        self._engine = self._layers[0].gazelle.engine
        self._read = self._engine.read

    def __call__(self, inputs: dict[str, Any], count: Tensor | int) -> Tensor:
        """The loss of a batch, whose gradients are added to the parameters'.

        Args:
            inputs: from the collator, on the device.
            count: labelled tokens of the whole accumulated batch.
        """
        batch = {name: inputs[name] for name in _TENSORS}
        batch["count"] = torch.as_tensor(count, device=batch["input_ids"].device)
        if self._engine.read != self._read:
            self.graph.clear()  # weights moved since, and recorded steps would read them where they were
        static = inputs["max_length_q"], inputs["uniform"]
        # What lies in host memory is sent for ahead of time, from pinned memory that a replay would find reused.
        if any(uses_host(layer.gazelle) for layer in self._layers):
            say_once("steps are not recorded as CUDA graphs: weights or activations come from host memory")
            return self._step(batch, static)
        loss = self.graph(batch, static)
        self._read = self._engine.read
        return loss

    def _step(self, batch: dict[str, Tensor], static: tuple) -> Tensor:
        longest, uniform = static
        starts = batch["cu_seq_lens_q"]
        inputs = {**batch, "labels": None, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
                  "uniform": uniform}
        del inputs["count"]
        total, _ = batch_loss(self.model, inputs, self.label_smoothing)
        loss = total / batch["count"].clamp(min=1)
        loss.backward()
        return loss.detach()
