"""Where a step's time goes: making batches, moving them, or computing."""

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gazelle.base.errors import OptionError

if TYPE_CHECKING:
    from gazelle.train.trainer import SFTTrainer

HIGH = 0.1  # share of a step's time from which on something is worth doing about it


@dataclass(frozen=True)
class IOReport:
    """Seconds of a micro-batch by where they go, and what to do about it.

    Attributes:
        data: reading rows and making a batch of them.
        host: moving the batch to the device.
        device: forward and backward.
        tokens: of a micro-batch, on average.
        batches: that were measured.
        advice: sentences.
    """

    data: float
    host: float
    device: float
    tokens: float
    batches: int
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of a whole micro-batch."""
        return self.data + self.host + self.device

    def __str__(self) -> str:
        lines = [f"{name:<8}{seconds * 1e3:10.2f} ms  {seconds / self.seconds:4.0%}"
                 for name, seconds in (("data", self.data), ("host", self.host), ("device", self.device))]
        head = f"a micro-batch of {self.tokens:,.0f} tokens, {self.batches} measured"
        return "\n".join([head, *lines, *self.advice])


def profile_io(trainer: "SFTTrainer", batches: int = 8) -> IOReport:
    """Run a few micro-batches of a trainer, without a step of its optimizer, and say where the time goes.

    The memory plan is in force meanwhile. Weights, gradients, random states and the trainer's counts are afterwards
    what they were.

    Args:
        trainer: with training data.
        batches: to measure, after one that is not counted.

    Raises:
        OptionError: the trainer has no training data.
    """
    if trainer.train_dataset is None:
        raise OptionError("there is nothing to train on", where="profile_io", found="train_dataset=None",
                          expected="a trainer with training data", fix="pass train_dataset= to the trainer")
    model = trainer.model
    gpu = trainer.args.device.type == "cuda"
    trainer._train_batch_size = trainer.args.train_batch_size
    training, counted = model.training, trainer.tokens
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    spent = {"data": 0.0, "host": 0.0, "device": 0.0}
    tokens = measured = 0

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    planned = contextlib.nullcontext() if trainer.plan is None else trainer.plan.in_force(model, trainer._stopwatch)
    with torch.random.fork_rng(devices=[trainer.args.device] if gpu else []), trainer._packed_attention(), planned:
        try:
            model.train()
            for parameter, _ in gradients:
                parameter.grad = None
            source = iter(trainer.get_train_dataloader())
            for number in range(batches + 1):
                began = now()
                if (batch := next(source, None)) is None:
                    break
                made = now()
                inputs = trainer._prepare_inputs(batch)
                moved = now()
                trainer.compute_loss(model, inputs).backward()
                done = now()
                if number:  # the first one warms up
                    spent = {"data": spent["data"] + made - began, "host": spent["host"] + moved - made,
                             "device": spent["device"] + done - moved}
                    tokens += int(inputs.get("tokens", inputs["labels"].numel()))
                    measured += 1
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            model.train(training)
            trainer.tokens = counted
    if not measured:
        raise OptionError("there are too few rows to measure", where="profile_io", found="one batch",
                          expected="at least two batches", fix="add rows, or lower per_device_train_batch_size")
    means = {name: seconds / measured for name, seconds in spent.items()}
    return IOReport(**means, tokens=tokens / measured, batches=measured, advice=_advice(trainer, means, gpu))


def _advice(trainer: "SFTTrainer", means: dict[str, float], gpu: bool) -> tuple[str, ...]:
    whole = sum(means.values())
    said = []
    workers = trainer.args.dataloader_num_workers
    if means["data"] > HIGH * whole:
        said.append("Batches are made too slowly: " + (
            f"set dataloader_num_workers above {workers}, or make the data_collator cheaper." if workers else
            "set dataloader_num_workers=2, so that they are made while the device computes."))
    if means["host"] > HIGH * whole:
        said.append("Moving batches takes long: " + (
            "set dataloader_pin_memory=True." if gpu and not trainer.args.dataloader_pin_memory else
            "a larger per_device_train_batch_size spreads it over more tokens."))
    return tuple(said) or ("Computing takes nearly all of the time: there is nothing to gain at the data.",)
