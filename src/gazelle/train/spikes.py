"""Steps that would do harm: gradients or losses that are no numbers, or far from those before.

Each is named and counted, and `SFTConfig.on_spike` says what comes of it. A GPU that computes in 16 or 32 bits is not
waited for: the step is undone on the device, and the host hears of it a step later.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gazelle.base.errors import TrainingError
from gazelle.base.log import logger

MOST = {"fp16": 25}  # not finite in a row; float16's loss scale halves at each until gradients fit
MOST_OTHERWISE = 3
MOST_ROLLBACKS = 3
WINDOW, WARM = 64, 20  # steps that one is compared with; fewer than that say nothing yet
LOSS_TIMES, LOSS_MORE = 3.0, 1.0  # a loss is a spike above so many medians, and so many nats above the median
DEVIATIONS = 8.0  # median absolute deviations of the logarithms: where values scatter, far is farther
LARGEST = torch.finfo(torch.float32).max


class RollBack(Exception):  # noqa: N818 — a message to the trainer, not an error
    """Training is to go on from the last checkpoint."""


class Spikes(TrainerCallback):
    """Looks at every step before the optimizer does.

    Args:
        policy: `SFTConfig.on_spike`.
        factor: `SFTConfig.spike_factor`.
        precision: that is computed in: "fp8", "fp16", or any other.
        device: that is trained on.
        flat: True if gradients lie end to end (`engine.flat`), where clipping leaves those that are not finite alone.
        checkpoint: the last checkpoint, if there is one.

    Attributes:
        counts: what happened, by kind.
        last: the last one, in words.
        names: parameters whose gradients were not finite then, where they could be told apart.

    Raises:
        TrainingError: too many in a row or too often, or any with the policy "stop".
        RollBack: with the policy "rollback".
    """

    def __init__(self, policy: str, factor: float, precision: str, device: torch.device, flat: Callable[[], bool],
                 checkpoint: Callable[[], Any]) -> None:
        self.policy, self.factor, self.precision, self.device = policy, factor, precision, device
        self.flat, self.checkpoint = flat, checkpoint
        self.late = False
        self.reset()

    def reset(self) -> None:
        """A call of `train` begins."""
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.counts: dict[str, int] = {}
        self.last, self.names = "", list[str]()
        self.in_a_row = 0
        self.leave_out = 0  # steps up to this one, after rolling back
        self.norm: Any = 0.0  # of the step's gradient, before clipping
        self._loss: Any = 0.0
        self._found: list[str] | None = None
        self._unheard: tuple[int, Any] | None = None  # a step, and its norm, loss and whether it was undone

    @property
    def skipped(self) -> int:
        """Steps that changed nothing."""
        return sum(number for kind, number in self.counts.items() if kind != "rolled back")

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find out whether the device can undo a step by itself."""
        on_device = self.flat() or _fused(_inner(optimizer))
        self.late = self.device.type == "cuda" and self.precision not in ("fp8", "fp16") and on_device

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first micro-batch comes next."""
        self._loss, self.norm, self._found = 0.0, 0.0, None

    def add_loss(self, loss: Tensor) -> None:
        """A micro-batch's share of the step's loss."""
        self._loss = self._loss + loss

    def before_clipping(self, model: Any) -> None:
        """Where clipping by a norm that is no number makes all gradients so: see which are, unless nobody waits."""
        if not self.late:
            self.look(model)

    def look(self, model: Any) -> None:
        """Note which gradients are not finite. Waits for the device."""
        trained = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
        self._found = [trained[number][0] for number in not_finite([grad for _, grad in trained])]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
                              **kwargs: Any) -> None:
        """Undo the step if it would do harm."""
        self._hear(args)
        step = state.global_step + 1
        if step <= self.leave_out:
            self._count("left out after rolling back")
            _drop(optimizer)
            return
        most_norm, most_loss = self.limits(args.max_grad_norm)
        norm, loss = _scalar(self.norm, self.device), _scalar(self._loss, self.device)
        if self.late:
            bad = ~((norm <= most_norm) & (loss <= most_loss))
            undo_on_device(_inner(optimizer), bad)
            self._unheard = step, _send(torch.stack([norm, loss, bad.float()]))
            return
        values = norm.item(), loss.item()
        if self._found is None and not math.isfinite(values[0]):
            self.look(model)
        harmful = bool(self._found) or not (values[0] <= most_norm and values[1] <= most_loss)
        if harmful and self.precision != "fp16":  # whose scaler does it, and would miss gradients that are gone
            _drop(optimizer)
        self._told(step, *values, harmful, args)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Hear of the last step; there is nothing left to stop or to roll back."""
        policy, self.policy = self.policy, "skip"
        try:
            self._hear(args)
        finally:
            self.policy = policy
        for name in ("found_inf", "grad_scale"):
            _inner(optimizer).__dict__.pop(name, None)

    def limits(self, max_grad_norm: float) -> tuple[float, float]:
        """The largest norm and loss that are no spike. What clipping leaves as it is never is one."""
        if not self.factor or len(self.norms) < WARM or self.precision == "fp16":
            return LARGEST, LARGEST
        return (max(_limit(self.norms, self.factor), max_grad_norm),
                max(_limit(self.losses, LOSS_TIMES), statistics.median(self.losses) + LOSS_MORE))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        if self._unheard is not None:
            self._unheard = self._unheard[0], _received(self._unheard[1])
        return {"losses": list(self.losses), "norms": list(self.norms), "counts": dict(self.counts), "last": self.last,
                "in_a_row": self.in_a_row, "leave_out": self.leave_out, "unheard": self._unheard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. What came after it, before rolling back to it, stays counted."""
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
        self.in_a_row = state["in_a_row"]
        self._unheard = state["unheard"]
        if self._unheard is not None and self._unheard[0] <= self.leave_out:
            self._unheard = None  # it has been heard: it is why the run went back
        if not self.leave_out:
            self.counts, self.last, self.leave_out = dict(state["counts"]), state["last"], state["leave_out"]

    def _hear(self, args: Any) -> None:
        """What became of the step before, on a device that is by now busy with this one."""
        if self._unheard is not None:
            (step, values), self._unheard = self._unheard, None
            norm, loss, bad = _received(values)
            self._told(step, norm, loss, bool(bad), args)

    def _told(self, step: int, norm: float, loss: float, bad: bool, args: Any) -> None:
        if not bad:
            self.in_a_row = 0
            self.norms.append(norm)
            self.losses.append(loss)
            return
        finite = math.isfinite(norm) and math.isfinite(loss) and not self._found
        self.in_a_row += 1
        self._count("spike" if finite else "not finite")
        self.names = self._found or []
        if self.names:
            more = f", nor are those of {len(self.names) - 1} others" if self.names[1:] else ""
            self.last = f"the gradient of {self.names[0]} is not finite{more}"
        elif finite:
            self.last = (f"a spike: gradient norm {norm:.3g} (median {statistics.median(self.norms):.3g}), "
                         f"loss {loss:.3g} (median {statistics.median(self.losses):.3g})")
        else:
            self.last = f"the loss is {loss:.3g}, the norm of the gradient {norm:.3g}"
        most = MOST.get(self.precision, MOST_OTHERWISE)
        if self.policy == "stop" or (not finite and self.in_a_row >= most):
            what = f"gradients were not finite in {self.in_a_row} steps in a row"
            if self.in_a_row < most:
                what = f"step {step} would have done harm"
            fix = "lower learning_rate or max_grad_norm" + (
                ', or train with precision="bf16"' if self.precision in ("fp8", "fp16") else "")
            raise TrainingError(what, where=self.names[0] if self.names else f"step {step}",
                                found=f"{self.last}; precision {self.precision}, learning rate {args.learning_rate:g}",
                                expected="a step like those before" if finite else "finite gradients",
                                fix=f"{fix}, and resume from {self.checkpoint()}" if self.checkpoint() else fix)
        if self.policy == "rollback" and self.checkpoint() is not None:
            self._roll_back(step)
        also = " There is no checkpoint yet to roll back to." if self.policy == "rollback" else ""
        logger.warning("Step %d is skipped: %s.%s", step, self.last, also)
        if finite and self.in_a_row >= most:
            logger.warning("%d spikes in a row: from now on these are taken for the ordinary.", self.in_a_row)
            self.norms.clear()
            self.losses.clear()

    def _roll_back(self, step: int) -> None:
        self._count("rolled back")
        if self.counts["rolled back"] > MOST_ROLLBACKS:
            raise TrainingError(f"rolled back {MOST_ROLLBACKS} times, and it comes again", where=f"step {step}",
                                found=self.last, expected="a run that settles",
                                fix=f"lower learning_rate, and resume from {self.checkpoint()}")
        logger.warning("Step %d: %s. Going back to %s and leaving out the steps up to this one.", step, self.last,
                       self.checkpoint())
        self.leave_out = step
        raise RollBack

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1


def not_finite(grads: list[Tensor]) -> list[int]:
    """Numbers of the gradients that hold an infinity or no number. Waits for the device."""
    if not grads:
        return []
    largest = torch.stack(torch._foreach_norm(grads, float("inf")))  # a sum of squares could overflow
    return (~largest.isfinite()).nonzero().flatten().tolist()


def undo_on_device(optimizer: Any, bad: Tensor) -> None:
    """Where `bad` (a scalar on the device) is true, the coming step of `optimizer` changes nothing, without waiting.

    torch's fused optimizers skip the step, as a gradient scaler would have them do; others get gradients of zero, so
    that moments fade for one step.
    """
    if _fused(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.masked_fill_(bad, 0.0)


def _scalar(value: Any, device: torch.device) -> Tensor:
    """A number as a tensor on the device, where it is made: sent there, it would be waited for."""
    if isinstance(value, Tensor):
        return value.detach().float().reshape(()).to(device)
    return torch.full((), float(value), device=device)


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper


def _fused(optimizer: Any) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def _drop(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None  # an optimizer leaves such parameters alone


def _limit(values: deque[float], times: float) -> float:
    logs = [math.log(max(value, 1e-30)) for value in values]
    middle = statistics.median(logs)
    deviation = statistics.median(abs(value - middle) for value in logs)
    return math.exp(min(middle + max(math.log(times), DEVIATIONS * deviation), math.log(LARGEST)))


def _send(values: Tensor) -> Any:
    """On their way to the host."""
    there = torch.empty(values.shape, pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived


def _received(sent: Any) -> list[float]:
    if isinstance(sent, list):
        return sent  # from a checkpoint
    there, arrived = sent
    arrived.synchronize()
    return there.tolist()
