"""The memory plan of a run: made before it starts, in force while it runs, made anew if memory still runs out."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import TrainerCallback

from gazelle.adapters.unwrap import unwrap
from gazelle.base.device import memory_in_use, peak_memory
from gazelle.base.errors import OptionError, TrainingError
from gazelle.base.log import logger, say_once
from gazelle.base.sizes import gigabytes, parse_bytes
from gazelle.data.encode import Encoded
from gazelle.engine import offload
from gazelle.engine.keep import ALL, KEEP, OFFLOAD, Keep
from gazelle.engine.outline import Batch, Outline
from gazelle.engine.plan import Plan, Rates, TooSmallError, make_plan
from gazelle.engine.probe import probe
from gazelle.models.host_embedding import embedding_on_host
from gazelle.models.modes import frozen_inputs
from gazelle.models.outline import outline_of
from gazelle.models.streamed import can_stream, weights_streamed
from gazelle.models.swap import runs_on_engine, swapped_layers
from gazelle.train.config import SFTConfig, optimizer_name
from gazelle.train.memory import largest_batch
from gazelle.train.ratio import only_these, plan_for, ratio_of
from gazelle.train.stopwatch import Stopwatch

RESERVE = 0.05  # of free memory: what the allocator cannot hand out in one piece, and libraries' own workspaces
HOST_SHARE = 0.8  # of the host's memory that is free: what is parked there is pinned
STEP_DOWN = 0.85  # of the predicted peak, after memory ran out
PROBED_ON_CPU = 512  # tokens; a layer's time grows with them, and a CPU takes long
SMALLER = ("lower per_device_train_batch_size or max_length, load the model in 4 bits, choose "
           'optim="paged_adamw_8bit" or a smaller r, and leave use_gradient_checkpointing at "auto"')
EVALUATION = "lower per_device_eval_batch_size, or leave out compute_metrics, which needs all logits"


@dataclass
class RunPlan:
    """A plan, what it was made from, and what came of it.

    Attributes:
        plan: what is in force, or was.
        batch: the largest micro-batch, which it is made for.
        notes: what happened to it, for the report.
        measured_peak: bytes, once the run is over; None where they cannot be told apart from other memory.
        measured_seconds: of a micro-batch as large as `batch`, once the run is over.
    """

    plan: Plan
    outline: Outline
    batch: Batch
    rates: Rates | None
    allowed: Callable[[Keep], bool] | None
    host: bool
    streams: bool
    host_memory: int | None = None
    notes: list[str] = field(default_factory=list)
    measured_peak: int | None = None
    measured_seconds: float | None = None
    _stack: contextlib.ExitStack | None = None
    _lowest: bool = False  # memory ran out in a step, and there is no plan for less

    @property
    def predicted_peak(self) -> int:
        """Bytes."""
        return self.plan.peak

    @property
    def predicted_seconds(self) -> float | None:
        """Of a micro-batch as large as `batch`."""
        return self.plan.seconds

    @contextlib.contextmanager
    def in_force(self, model: Any, stopwatch: Stopwatch) -> Iterator[None]:
        """While it lasts, layers keep what the plan says, and weights lie where it says; peak and time are measured.

        Raises:
            TrainingError: memory ran out, and there is no plan for less; or it ran out outside of steps.
        """
        device = str(stopwatch.device)
        self._enter(model)
        try:
            if stopwatch.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            yield
            if stopwatch.device.type == "cuda":
                self.measured_peak = peak_memory(device)
            if stopwatch.seconds_a_token is not None:
                self.measured_seconds = stopwatch.seconds_a_token * self.batch.tokens
        except torch.OutOfMemoryError as error:
            what, fix = "memory ran out outside of training steps", EVALUATION
            if self._lowest:
                what, fix = "memory ran out, and there is no plan for less", SMALLER
            raise TrainingError(what, where=device, found=str(error), fix=fix,
                                expected=f"room for the predicted peak of {gigabytes(self.plan.peak)}") from error
        finally:
            self._leave()

    def step_down(self, model: Any) -> bool:
        """Go on with a plan for less memory, after there was not enough; False if there is none."""
        try:
            lower = self._planned(int(self.plan.peak * STEP_DOWN))
        except TooSmallError as error:
            if error.smallest >= self.plan.peak:
                self._lowest = True
                return False
            lower = self._planned(error.smallest)
        self.notes.append(f"memory ran out with a predicted peak of {gigabytes(self.plan.peak)}: planned again for "
                          f"{gigabytes(lower.peak)} ({lower.describe()})")
        logger.warning("Out of memory: %s.", self.notes[-1])
        self._leave()
        self.plan = lower
        self._enter(model)
        return True

    def lines(self) -> list[tuple[str, str]]:
        """(what, predicted, and measured where it was) for the report."""
        peak, seconds = gigabytes(self.plan.peak), self.plan.seconds
        if self.measured_peak is not None:
            peak += f"; measured {gigabytes(self.measured_peak)} ({self.measured_peak / self.plan.peak - 1:+.1%})"
        found = [("plan", self.plan.describe()), ("peak memory", f"predicted {peak}")]
        if seconds is not None:
            time = f"predicted {seconds * 1e3:,.0f} ms for {self.batch.tokens:,} tokens"
            if self.measured_seconds is not None:
                time += f"; measured {self.measured_seconds * 1e3:,.0f} ms ({self.measured_seconds / seconds - 1:+.1%})"
            found.append(("time of a micro-batch", time))
        return found + [("note", note) for note in self.notes]

    def _planned(self, budget: int) -> Plan:
        return make_plan(self.outline, self.batch, budget, self.rates, host=self.host, allowed=self.allowed,
                         streams=self.streams, host_memory=self.host_memory)

    def _enter(self, model: Any) -> None:
        layers = swapped_layers(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen_inputs(model))
            if self.plan.embedding_on_host:
                stack.enter_context(embedding_on_host(model))
            if self.plan.streamed:
                stack.enter_context(weights_streamed(model, self.plan.streamed))
            for module, keep in zip(layers, self.plan.keeps, strict=True):
                module.gazelle.keep = keep
                stack.callback(setattr, module.gazelle, "keep", None)
            self._stack = stack.pop_all()

    def _leave(self) -> None:
        offload.empty()
        if self._stack is not None:
            self._stack.close()
            self._stack = None


class Window(TrainerCallback):
    """The micro-batches of one optimizer step, run again with a smaller plan if memory runs out in one of them.

    Args:
        plan: of the run.
        model: that is trained.
        clear: drops the gradients and whatever else the failed step left.
    """

    def __init__(self, plan: RunPlan, model: Any, clear: Callable[[], None]) -> None:
        self.plan, self.model, self.clear = plan, model, clear
        self.batches: list[dict[str, Any]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first micro-batch of a step comes next."""
        self.batches.clear()

    def run(self, batch: dict[str, Any], micro_batch: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """The loss of a micro-batch.

        Raises:
            torch.OutOfMemoryError: even the smallest plan needs more than there is.
        """
        self.batches.append(batch)
        try:
            return micro_batch(batch)
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # its frames hold on to activations
        while True:
            self.clear()
            if not self.plan.step_down(self.model):
                raise failure
            try:
                return [micro_batch(again) for again in self.batches][-1]
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)


def plan_run(model: Any, rows: Encoded, config: SFTConfig, *, packed: bool,
             largest: tuple[int, int] | None = None) -> RunPlan | None:
    """The plan for a model that runs on the engine, or None for one that does not.

    Args:
        model: accelerated, with its adapter.
        rows: what it is to be trained on.
        config: the run's settings.
        packed: rows lie end to end, and only labelled tokens reach the head.
        largest: as from `largest_batch`, where batches are made otherwise.

    Raises:
        OptionError: the budget is too small, or fits no plan of the kind that was asked for.
    """
    if not runs_on_engine(model):
        if config.memory_budget is not None:
            say_once("memory_budget has no effect: there is a plan only for models that run on the engine")
        return None
    tokens, labelled = largest or largest_batch(rows, config, packed=packed)
    batch = Batch(tokens, labelled, min(tokens, config.max_length or tokens, max(map(_length, rows.examples))))
    made = plan_outline(model, batch, unwrap(model).device, optim=optimizer_name(config),
                        precision=config.precision, budget=config.memory_budget,
                        checkpointing=asked_checkpointing(model, config))
    if any(keep != KEEP for keep in made.plan.keeps) or made.plan.streamed:
        logger.info("Memory plan for %s: %s; predicted peak %s.", gigabytes(made.plan.budget), made.plan.describe(),
                    gigabytes(made.plan.peak))
    return made


def plan_outline(model: Any, batch: Batch, device: torch.device, *, optim: str, precision: str,
                 budget: str | int | None, checkpointing: bool | str, stored: str | None = None,
                 measured: bool = True) -> RunPlan:
    """The plan for an accelerated model on a device, where it need not be yet.

    Args:
        model: with its adapter; on the meta device it has no weights.
        batch: the largest micro-batch.
        device: where it trains.
        optim, precision: as in `SFTConfig`.
        budget: as `SFTConfig.memory_budget`.
        checkpointing: as `SFTConfig.use_gradient_checkpointing`.
        stored: how weights are going to be kept, for a model on the meta device.
        measured: time a layer on the device; else go by floating-point operations.

    Raises:
        OptionError: the budget is too small, or fits no plan of the kind that was asked for.
    """
    outline = outline_of(model, optim, stored, precision)
    host = device.type == "cuda"
    host_memory = int(psutil.virtual_memory().available * HOST_SHARE) if host else None
    allowed = _allowed(checkpointing, host=host)
    streams = host and can_stream(model) and stored != "int8"
    bytes_ = budget_of(budget, device)
    rates = _rates(model, outline, batch, device, precision) if measured else None
    ratio = ratio_of(model)
    try:
        if ratio is None:
            plan = make_plan(outline, batch, bytes_, rates, host=host, allowed=allowed, streams=streams,
                             host_memory=host_memory)
        else:
            plan, allowed = plan_for(ratio, outline, batch, bytes_), only_these
    except TooSmallError as error:
        raise too_small(error, bytes_, budget is not None) from None
    return RunPlan(plan, outline, batch, rates, allowed, host, streams, host_memory)


def too_small(error: TooSmallError, budget: int, chosen: bool) -> OptionError:
    """What a user is told when nothing fits."""
    enough = -(-error.smallest // 10**8) * 10**8  # rounded up: as it is shown, it is to be enough
    return OptionError(
        "no plan fits into the memory budget" if chosen else "the model does not fit into the memory that is free",
        where="memory_budget", found=gigabytes(budget), expected=f"at least {gigabytes(enough)} for this model and "
        "batch", fix=SMALLER)


def budget_of(asked: str | int | None, device: torch.device) -> int:
    """Bytes a run may have on a device: as asked, or what is free and what torch holds already."""
    if asked is not None:
        return parse_bytes(asked, "memory_budget")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.memory_allocated(device) + int((free + unused) * (1 - RESERVE))
    if device.type == "cpu":
        return memory_in_use("cpu") + int(psutil.virtual_memory().available * (1 - RESERVE))
    return 2**62  # a device that does not say


def asked_checkpointing(model: Any, config: SFTConfig) -> bool | str:
    """What was chosen, where the trainer's own setting comes before the adapter's."""
    if config.use_gradient_checkpointing != "auto":
        return config.use_gradient_checkpointing
    if config.gradient_checkpointing or unwrap(model).is_gradient_checkpointing:
        return True
    return getattr(model, "use_gradient_checkpointing", "auto")


def _allowed(asked: bool | str, *, host: bool) -> Callable[[Keep], bool] | None:
    """What a user's choice leaves. Without host memory apart, inputs that are to wait there stay where they are."""
    only = {True: ALL, False: KEEP, "offload": OFFLOAD if host else ALL}.get(asked)
    return None if only is None else lambda keep: keep == only


def _length(row: Any) -> int:
    return len(row.input_ids)


def _rates(model: Any, outline: Outline, batch: Batch, device: torch.device, precision: str) -> Rates:
    measured = batch
    if device.type == "cpu" and batch.tokens > PROBED_ON_CPU:
        measured = Batch(PROBED_ON_CPU, min(batch.labelled, PROBED_ON_CPU), min(batch.longest, PROBED_ON_CPU))
    dtype = swapped_layers(model)[0].input_layernorm.weight.dtype
    head = unwrap(model).get_output_embeddings().weight
    rates = probe(outline, measured, device, dtype, precision=precision,
                  head=None if head.device.type == "meta" else head)
    return rates.scaled(batch.tokens / measured.tokens)
