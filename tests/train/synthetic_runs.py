"""Logs of runs as they look: noisy training loss, a few evaluations, gradient norms, a schedule of the learning rate.

Noise of a log line is lognormal with a heavy tail (Student's t with eight degrees of freedom, cut at four deviations:
farther out is a spike by any account), as means over few rows are; evaluations, always over the same rows, wander by
half a percent.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Shape = Callable[[float], float]  # share of the run that is over -> nats
Entries = list[dict[str, Any]]


def schedule(kind: str, done: float, warm: float = 0.05) -> float:
    """Share of the peak learning rate."""
    if done < warm:
        return done / warm
    left = (1 - done) / (1 - warm)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[kind]


def log_of(loss: Shape, *, seed: int, held: Shape | None = None, evals: int = 3, steps: int = 600, every: int = 5,
           noise: float = 0.05, held_noise: float = 0.005, kind: str = "cosine", peak: float = 2e-4, epochs: float = 3,
           norm: Shape = lambda done: 0.6, jumps: dict[int, float] | None = None,
           norm_jumps: dict[int, float] | None = None) -> Entries:
    """The log of a run.

    Args:
        loss, held, norm: curves of training loss, held-out loss and gradient norm.
        evals: evaluations, evenly spread, the last one at the end.
        every: optimizer steps of a log line.
        noise, held_noise: standard deviation of a line and of an evaluation, as a share.
        kind: of schedule.
        jumps, norm_jumps: number of a line -> factor.
    """
    random = np.random.default_rng(seed)
    entries: Entries = []
    due = {round(steps * (number + 1) / evals) for number in range(evals)} if held else set()
    for step in range(1, steps + 1):
        done = step / steps
        if step % every == 0:
            line = step // every - 1
            wild = math.exp(noise * float(np.clip(math.sqrt(6 / 8) * random.standard_t(8), -4, 4)))
            entries.append({
                "step": step, "epoch": epochs * done, "loss": loss(done) * wild * (jumps or {}).get(line, 1.0),
                "grad_norm": norm(done) * math.exp(0.3 * random.normal()) * (norm_jumps or {}).get(line, 1.0),
                "learning_rate": peak * schedule(kind, done)})
        if step in due and held is not None:
            entries.append({"step": step, "epoch": epochs * done, "eval_runtime": 1.0,
                            "eval_loss": held(done) * (1 + held_noise * random.normal())})
    return [*entries, {"step": steps, "epoch": epochs, "train_runtime": 1.0, "train_loss": 1.0}]


def settling(start: float, end: float, time: float = 0.15, slope: float = 0.06) -> Shape:
    """Falls fast and then slowly: exp(-done / time), and a slow logarithm."""
    return lambda done: end + (start - end) * math.exp(-done / time) - slope * end * math.log1p(9 * done) / math.log(10)


def stairs(start: float, levels: list[float], time: float = 0.05) -> Shape:
    """A level for each epoch, lower by what is remembered; inside of an epoch nearly flat."""
    def loss(done: float) -> float:
        epoch = min(int(done * len(levels)), len(levels) - 1)
        return levels[epoch] * (1 - 0.03 * (done * len(levels) - epoch)) + (start - levels[0]) * math.exp(-done / time)
    return loss


def through(*points: tuple[float, float]) -> Shape:
    """Straight lines from point to point."""
    return lambda done: float(np.interp(done, *zip(*points, strict=True)))
