"""One task after another on the same model, without forgetting the first: rows of earlier runs come again, and
weights are drawn back to what they were.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError, nearest
from gazelle.base.files import write_text
from gazelle.base.log import logger
from gazelle.data.encode import Example

STRATEGIES = ("balanced", "random", "recent")
FILE = "replay.json"


class Replay:
    """Rows of earlier runs, and how strongly weights are held.

    Args:
        memory_size: rows kept at most.
        strategy: "balanced", as many rows of every run; "random", each row seen so far with the same probability;
            "recent", those of the last run.
        regularization: λ of the penalty λ·Σ(w − w₀)² on the trained weights, w₀ being those before the run; from the
            second run on.
        memory: a file or folder that a run wrote, to go on from.
    """

    def __init__(self, memory_size: int = 1000, strategy: str = "balanced", regularization: float = 0.0,
                 memory: str | Path | None = None) -> None:
        if isinstance(memory_size, bool) or not isinstance(memory_size, int) or memory_size < 1:
            raise OptionError("a value that cannot be used", where="memory_size", found=repr(memory_size),
                              expected="a whole number of at least 1", fix="change memory_size")
        if strategy not in STRATEGIES:
            raise OptionError("there is no such way to choose rows", where="replay_strategy", found=strategy,
                              expected=", ".join(STRATEGIES), fix=nearest(strategy, STRATEGIES))
        if not regularization >= 0:
            raise OptionError("a value that cannot be used", where="regularization", found=repr(regularization),
                              expected="a number of at least 0", fix="change regularization")
        self.memory_size, self.strategy, self.regularization = memory_size, strategy, regularization
        self.tasks: list[list[Example]] = []  # rows kept of each run
        self.seen: list[int] = []  # rows that each run had
        if memory is not None:
            self._read(Path(memory))

    @property
    def rows(self) -> list[Example]:
        """All that are kept."""
        return [row for task in self.tasks for row in task]

    def remember(self, rows: list[Example], seed: int) -> None:
        """Keep rows of a run that has ended, and fewer of those before."""
        self.tasks.append(list(rows))
        self.seen.append(len(rows))
        random = np.random.default_rng([seed, len(self.tasks)])
        for task, count in zip(self.tasks, self._shares(), strict=True):
            chosen = sorted(random.permutation(len(task))[:count].tolist())
            task[:] = [task[index] for index in chosen]

    def _shares(self) -> list[int]:
        """How many rows of each run are kept."""
        sizes = [len(task) for task in self.tasks]
        weights = {"balanced": [1] * len(sizes), "random": self.seen,
                   "recent": [0] * (len(sizes) - 1) + [1]}[self.strategy]
        shares = [0] * len(sizes)
        for _ in range(min(self.memory_size, sum(size for size, weight in zip(sizes, weights, strict=True) if weight))):
            # The next place goes to the run that has the fewest for its weight, and rows left.
            free = [index for index, size in enumerate(sizes) if shares[index] < size and weights[index]]
            shares[min(free, key=lambda index: (shares[index] + 1) / weights[index])] += 1
        return shares

    def save(self, folder: Path) -> None:
        """Write the rows as token ids and labels."""
        content = {"seen": self.seen, "tasks": [[[row.where, list(row.input_ids), list(row.labels)] for row in task]
                                                for task in self.tasks]}
        write_text(folder / FILE, json.dumps(content) + "\n")

    def _read(self, path: Path) -> None:
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.tasks = [[Example(ids, labels, where) for where, ids, labels in task] for task in content["tasks"]]
            self.seen = [int(count) for count in content["seen"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError("no rows of earlier runs can be read here", where="memory", found=f"{path}: {error}",
                              expected=f"{FILE} as a run with incremental tuning writes it",
                              fix="name that run's output folder") from error


class HoldOn(TrainerCallback):
    """A run with replay: the penalty at every step, and what is remembered when it ends.

    Args:
        replay: of the model.
        own: the run's own rows, without those that come again.
        model: that is trained.
    """

    def __init__(self, replay: Replay, own: list[Example], model: Any) -> None:
        self.replay, self.own, self.model = replay, own, model
        self.earlier = len(replay.rows)  # rows that come again
        self.remembered = False
        self.before: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The weights before the run, which a run that is resumed cannot know."""
        return {"before": self.before, "earlier": self.earlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds.

        Raises:
            OptionError: other rows of earlier runs come again than came before.
        """
        if state["earlier"] != self.earlier:
            raise OptionError("the run had other rows of earlier runs", where="enable_incremental_tuning",
                              found=f"{self.earlier} rows", expected=f"{state['earlier']} rows",
                              fix="pass memory= with the output folder of the run before this one")
        self.before = {name: value.to(self.model.device) for name, value in state["before"].items()}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Note the weights that are drawn back to."""
        if self.replay.regularization and self.replay.tasks:
            self.before = {name: parameter.detach().clone() for name, parameter in self._trained()}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Add the gradient of λ·Σ(w − w₀)². After clipping: the pull does not depend on how steep the loss is."""
        if not self.before:
            return
        with torch.no_grad():
            for name, parameter in self._trained():
                if parameter.grad is not None:
                    pull = (parameter - self.before[name]).to(parameter.grad.dtype)
                    parameter.grad.add_(pull, alpha=2 * self.replay.regularization)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember this run's rows; they are saved in its folder."""
        if not self.remembered:  # a run that is stopped and taken up again ends twice
            self.replay.remember(self.own, args.seed)
            self.remembered = True
        if args.output_dir and state.is_world_process_zero:
            self.replay.save(Path(args.output_dir))

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def replay_of(model: Any) -> Replay | None:
    """What `model.enable_incremental_tuning` set up; None without it."""
    return getattr(unwrap(model), "gazelle_replay", None)


def with_replay(model: Any, encoded: Any, callbacks: Iterable[Any] = ()) -> HoldOn | None:
    """Add rows of earlier runs to a run's; returns what has to watch it, or None.

    Where `callbacks` hold one that does already, for rows that were encoded again, it learns of them.
    """
    replay = replay_of(model)
    if replay is None or encoded is None:
        return None
    own = list(encoded.examples)
    for callback in callbacks:
        if isinstance(callback, HoldOn):
            callback.own = own
    if replay.rows:
        encoded.examples += replay.rows
        logger.info("%d rows of %d earlier runs come again.", len(replay.rows), len(replay.tasks))
    return HoldOn(replay, own, model)
