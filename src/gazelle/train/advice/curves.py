"""The curves of a run as arrays, and statistics of them that a few wild values do not move."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazelle.train.metrics import is_eval_loss

Floats = NDArray[np.float64]
COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "epoch")
SIGMA = 1.4826  # median absolute deviations of a Gaussian in one standard deviation
MEDIAN_ERROR = 1.25  # a median's standard error is this many times a mean's


class Curves:
    """Losses, norms and rates of the log lines so far; what a line does not have is NaN.

    Attributes:
        ended: the line came that transformers writes behind the last step.
    """

    def __init__(self) -> None:
        self._table = np.empty((64, len(COLUMNS)))  # grows by doubling: a long run has many lines
        self._lines = 0
        self._evals: dict[str, list[list[float]]] = {}
        self.ended = False

    def take(self, entry: Mapping[str, Any]) -> bool:
        """Add an entry of `metrics.jsonl` or of transformers' `log_history`; True if there is anything new in it."""
        values = [number(entry.get("step", 0)), *(number(entry.get(name)) for name in COLUMNS[1:])]
        evals = list(filter(is_eval_loss, entry))
        if "loss" in entry:
            if self._lines == len(self._table):
                self._table = np.concatenate([self._table, np.empty_like(self._table)])
            self._table[self._lines] = values
            self._lines += 1
        for name in evals:
            self._evals.setdefault(name, []).append([values[0], number(entry[name]), values[-1]])
        ends = "train_runtime" in entry
        self.ended = self.ended or ends
        return "loss" in entry or bool(evals) or ends

    def __len__(self) -> int:
        return self._lines

    def __getitem__(self, name: str) -> Floats:
        """A column of the training lines."""
        return self._table[:self._lines, COLUMNS.index(name)]

    def finite(self) -> tuple[Floats, Floats]:
        """Steps and losses of the lines whose loss is a number."""
        losses = self["loss"]
        there = np.isfinite(losses)
        return self["step"][there], losses[there]

    def evals(self) -> dict[str, tuple[Floats, Floats, Floats]]:
        """Of each evaluation set steps, losses and epochs, where the loss is a number."""
        found = {}
        for name, rows in self._evals.items():
            table = np.array(rows)
            table = table[np.isfinite(table[:, 1])]
            if len(table):
                found[name] = table[:, 0], table[:, 1], table[:, 2]
        return found

    @property
    def step(self) -> int:
        """Of the last line."""
        last = [rows[-1][0] for rows in self._evals.values()]
        return int(max([*last, *self["step"][-1:]], default=0))

    @property
    def peak_rate(self) -> float:
        """The highest learning rate so far; NaN if none was logged."""
        rates = self["learning_rate"]
        return float(np.nanmax(rates)) if np.isfinite(rates).any() else math.nan

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"lines": self._table[:self._lines].copy(), "ended": self.ended,
                "evals": {name: np.array(rows) for name, rows in self._evals.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._lines, self.ended = len(state["lines"]), state["ended"]
        self._table = np.concatenate([state["lines"], np.empty((64, len(COLUMNS)))])
        self._evals = {name: rows.tolist() for name, rows in state["evals"].items()}


def number(value: Any) -> float:
    """`value` as a float; NaN for what is none, as in a metrics file, where NaN is null."""
    return float(value) if isinstance(value, int | float | np.number) else math.nan


def noise(values: Floats) -> float:
    """Standard deviation of the values around whatever trend they have, from differences of neighbours."""
    if len(values) < 3:
        return 0.0
    steps = np.diff(values)
    return float(SIGMA * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2))


def halves(values: Floats) -> tuple[float, float, float]:
    """Median of the first half, fall from it to the median of the second, and the standard error of that fall."""
    first, second = np.array_split(values, 2)
    error = MEDIAN_ERROR * noise(values) * math.sqrt(1 / len(first) + 1 / len(second))
    return float(np.median(first)), float(np.median(first) - np.median(second)), error


def smooth(values: Floats, width: int = 3) -> Floats:
    """Medians of `width` neighbours, five or more to a width; the values themselves where there are fewer."""
    if len(values) < width:
        return values
    return np.median(np.lib.stride_tricks.sliding_window_view(values, width)[::max(1, width // 5)], axis=1)
