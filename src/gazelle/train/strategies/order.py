"""In which order rows come: from easy to hard, or rows of like length together. Every row comes once an epoch.

An order follows from seed, epoch and the rows alone, so that a run that is resumed goes on with the row it was at.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from gazelle.base.errors import OptionError
from gazelle.train.loss import batch_loss
from gazelle.train.trainer import SFTTrainer

Metric = str | Callable[[dict[str, Any]], float]


class _Ordered(Sampler[int]):
    """Indices in an order of its own for each epoch."""

    def __init__(self, count: int, order: Callable[[int], Sequence[int]]) -> None:
        self.count, self.order, self.epoch = count, order, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))


def curriculum_order(ranks: Sequence[int], eligible: Callable[[int], int], rows_a_step: int, first_step: int,
                     seed: int) -> list[int]:
    """Indices in the order of a curriculum: each step draws from the easiest rows that are left.

    Args:
        ranks: indices from the easiest row to the hardest.
        eligible: optimizer step -> how many of the easiest rows may come.
        rows_a_step: rows of one optimizer step.
        first_step: the step at which this epoch begins.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    order: list[int] = []
    pool: list[int] = []
    opened = 0
    while len(order) < len(ranks):
        step = first_step + len(order) // rows_a_step
        wanted = min(rows_a_step, len(ranks) - len(order))
        limit = max(eligible(step), len(order) + wanted)  # where too few are left, the next easiest come early
        pool += ranks[opened:limit]
        opened = max(opened, limit)
        for _ in range(wanted):
            at = int(random.integers(len(pool)))
            pool[at], pool[-1] = pool[-1], pool[at]
            order.append(pool.pop())
    return order


def bucketed_order(lengths: Sequence[int], batch: int, smallest: int, step: int, seed: int) -> list[int]:
    """Indices in an order in which every full batch holds rows of one bucket, but for what buckets leave over.

    Args:
        lengths: tokens of each row.
        batch: rows of a batch.
        smallest: rows up to this length share the first bucket.
        step: width of the other buckets, in tokens.
        seed: of the order inside of buckets, and of batches.
    """
    random = np.random.default_rng(seed)
    buckets: dict[int, list[int]] = {}
    for index in random.permutation(len(lengths)):
        buckets.setdefault(max(0, math.ceil((lengths[index] - smallest) / step)), []).append(int(index))
    batches, left = [], []
    for _, rows in sorted(buckets.items()):
        full = len(rows) - len(rows) % batch
        batches += [rows[at : at + batch] for at in range(0, full, batch)]
        left += rows[full:]
    full = len(left) - len(left) % batch
    batches += [left[at : at + batch] for at in range(0, full, batch)]
    return [row for at in random.permutation(len(batches)) for row in batches[at]] + left[full:]


class Curriculum(TrainerCallback):
    """How hard each row is, and how many of the easiest may come at a step. What was measured is saved with the run.

    Args:
        trainer: whose rows they are.
        metric: "length" in tokens, "loss" of the model as it is before the first step, or a function of an entry of
            `trainer.train_dataset` ({"input_ids", "labels", ...}).
        start, end: with "length", the longest row that comes at the first step, and from `steps` on. With another
            metric, `start / end` is the share of the rows that come at the first step.
        steps: optimizer steps until all rows may come.
    """

    def __init__(self, trainer: SFTTrainer, metric: Metric, start: int, end: int, steps: int) -> None:
        self.trainer, self.metric, self.start, self.end, self.steps = trainer, metric, start, end, steps
        self.difficulties: list[float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is saved in checkpoints: losses would not be the same again."""
        return {"difficulties": self.difficulties}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self.difficulties = state["difficulties"]

    def order(self, epoch: int) -> list[int]:
        """Indices of an epoch."""
        args = self.trainer.args
        difficulties = self.measured()
        ranks = sorted(range(len(difficulties)), key=lambda index: difficulties[index])
        ranked = [difficulties[index] for index in ranks]
        rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        first = epoch * math.ceil(len(ranks) / rows_a_step)

        def eligible(step: int) -> int:
            done = min(1.0, step / self.steps)
            if done == 1.0:
                return len(ranks)
            if self.metric == "length":
                return int(np.searchsorted(ranked, self.start + (self.end - self.start) * done, side="right"))
            share = self.start / self.end
            return math.ceil(len(ranks) * (share + (1 - share) * done))

        return curriculum_order(ranks, eligible, rows_a_step, first, args.seed + epoch)

    def measured(self) -> list[float]:
        """Difficulty of each row, measured the first time it is asked for."""
        if self.difficulties is None:
            rows = [self.trainer.train_dataset[index] for index in range(len(self.trainer.train_dataset))]
            if self.metric == "length":
                self.difficulties = [float(len(row["input_ids"])) for row in rows]
            elif callable(self.metric):
                self.difficulties = [float(self.metric(row)) for row in rows]
            else:
                self.difficulties = self._losses(rows)
            if wrong := [index for index, value in enumerate(self.difficulties) if not math.isfinite(value)]:
                raise OptionError("a row's difficulty is not a number", where="difficulty_metric",
                                  found=f"{self.difficulties[wrong[0]]} for row {wrong[0] + 1}",
                                  expected="a finite number", fix="mend the function, or the row")
        return self.difficulties

    def _losses(self, rows: list[dict[str, Any]]) -> list[float]:
        trainer = self.trainer
        training = trainer.model.training
        trainer.model.eval()
        losses = []
        with torch.no_grad():
            for row in rows:
                inputs = trainer._prepare_inputs(trainer.data_collator([row]))
                total, _ = batch_loss(trainer.model, inputs)
                losses.append(total.item() / max(1, int((inputs["labels"] != -100).sum())))
        trainer.model.train(training)
        return losses


class CurriculumTrainer(SFTTrainer):
    """`SFTTrainer` with easy rows first (https://dl.acm.org/doi/10.1145/1553374.1553380).

    Args:
        *args, **kwargs: of `SFTTrainer`.
        difficulty_metric, start_length, end_length, steps: of `Curriculum`. Every row comes once an epoch: where too
            few easy ones are left, the next easiest come early.

    Raises:
        OptionError: no such metric, or lengths and steps that make no schedule.
    """

    ordered = True

    def __init__(self, *args: Any, difficulty_metric: Metric = "length", start_length: int = 512,
                 end_length: int = 2048, steps: int = 1000, **kwargs: Any) -> None:
        if not callable(difficulty_metric) and difficulty_metric not in ("length", "loss"):
            raise OptionError("there is no such measure of difficulty", where="difficulty_metric",
                              found=difficulty_metric, expected="length, loss, or a function of a row",
                              fix='leave it out for "length"')
        _check_range("start_length", start_length, "end_length", end_length)
        _check_count("steps", steps)
        super().__init__(*args, **kwargs)
        if self.args.packing and difficulty_metric == "length":
            raise OptionError("packed bins are all of one length", where="packing", found="True",
                              expected="rows of their own lengths", fix="leave packing out, or choose another metric")
        self.curriculum = Curriculum(self, difficulty_metric, start_length, end_length, steps)
        self.add_callback(self.curriculum)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _Ordered(len(self.train_dataset), self.curriculum.order)


class DynamicSequenceLengthTrainer(SFTTrainer):
    """`SFTTrainer` whose batches hold rows of like length, so that a batch is as long as its rows need.

    Args:
        *args, **kwargs: of `SFTTrainer`.
        max_sequence_length: longest row in tokens; takes the place of `max_length`.
        min_sequence_length: rows up to this length go together.
        length_step: rows of a batch differ by less than this many tokens, but for those that a bucket leaves over.

    Raises:
        OptionError: lengths that make no buckets.
    """

    def __init__(self, *args: Any, max_sequence_length: int = 2048, min_sequence_length: int = 256,
                 length_step: int = 128, **kwargs: Any) -> None:
        _check_range("min_sequence_length", min_sequence_length, "max_sequence_length", max_sequence_length)
        _check_count("length_step", length_step)
        self.smallest, self.step = min_sequence_length, length_step
        super().__init__(*args, max_length=max_sequence_length, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(self.train_dataset[index]["input_ids"]) for index in range(len(self.train_dataset))]
        args = self.args
        return _Ordered(len(lengths), lambda epoch: bucketed_order(
            lengths, args.per_device_train_batch_size, self.smallest, self.step, args.seed + epoch))


def _check_range(low_name: str, low: int, high_name: str, high: int) -> None:
    _check_count(low_name, low)
    _check_count(high_name, high)
    if low > high:
        raise OptionError(f"{low_name} is above {high_name}", where=low_name, found=str(low),
                          expected=f"at most {high}", fix=f"exchange them, or raise {high_name}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError("a value that cannot be used", where=name, found=repr(value),
                          expected="a whole number of at least 1", fix=f"change {name}")
