"""Batches by tokens instead of rows: as many short rows at a time as one long one takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gazelle.base.errors import OptionError
from gazelle.base.log import logger, say_once
from gazelle.data.encode import Example
from gazelle.train.dataset import Bins
from gazelle.train.plan import plan_run

if TYPE_CHECKING:
    from gazelle.train.trainer import SFTTrainer


def token_batches(lengths: Sequence[int], budget: int, most: int, *, padded: bool, seed: int) -> list[list[int]]:
    """Indices of rows, grouped to batches in a random order; each index is in exactly one.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch, with padding if rows are padded; a longer row is a batch of its own.
        most: rows of a batch.
        padded: a batch takes its longest row's tokens for every row.
        seed: of the order.
    """
    batches: list[list[int]] = []
    longest = total = 0
    for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        longest, total = max(longest, lengths[index]), total + lengths[index]
        size = longest * (len(batches[-1]) + 1) if padded and batches else total
        if not batches or len(batches[-1]) == most or size > budget:
            batches.append([])
            longest = total = lengths[index]
        batches[-1].append(index)
    return batches


def largest_of(bins: Sequence[Sequence[Example]], *, packed: bool) -> tuple[int, int]:
    """Tokens, and tokens that reach the head, of the largest of these batches."""
    if not packed:
        tokens = max(len(rows) * max(len(row.input_ids) for row in rows) for rows in bins)
        return tokens, tokens
    return (max(sum(len(row.input_ids) for row in rows) for rows in bins),
            max(sum(len(row.labels) - list(row.labels).count(-100) for row in rows) for rows in bins))


def enable_dynamic_batching(trainer: "SFTTrainer", max_batch_size: int = 8, timeout: float | None = None,
                            max_tokens: int | None = None) -> None:
    """Make a trainer's batches of as many rows as a budget of tokens takes, instead of a fixed number of rows.

    Args:
        trainer: made, and not yet run.
        max_batch_size: rows of a batch at most.
        timeout: taken because scripts pass it; there is nothing to wait for.
        max_tokens: of a batch; default: as many as `per_device_train_batch_size` of the longest row. The memory plan is
            made anew for batches larger than those it was made for.

    Raises:
        OptionError: rows are packed to bins, the caller's own collator makes the batches, or they do not fit in memory.
    """
    for name, value in (("max_batch_size", max_batch_size), ("max_tokens", max_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError("a value that cannot be used", where=name, found=repr(value),
                              expected="a whole number of at least 1", fix=f"change {name}")
    data = trainer.train_dataset
    if not isinstance(data, Bins) or trainer.args.packing:
        raise OptionError("batches are made another way already", where="enable_dynamic_batching",
                          found="packing=True" if isinstance(data, Bins) else "a data_collator of one's own",
                          expected="rows that the trainer batches itself", fix="leave one of the two out")
    if timeout is not None:
        say_once(f"enable_dynamic_batching(timeout={timeout}) has no effect: rows are read before training starts, so "
                 "there is nothing to wait for")
    rows = [row for entry in data.bins for row in entry]
    lengths = [len(row.input_ids) for row in rows]
    args = trainer.args
    budget = max_tokens or args.per_device_train_batch_size * max(lengths)
    batches = token_batches(lengths, budget, max_batch_size, padded=not trainer._packed, seed=args.seed)
    bins = [[rows[index] for index in batch] for batch in batches]
    largest = largest_of(bins, packed=trainer._packed)
    window, encoded = trainer._window, trainer.prepared.train
    if window is not None and encoded is not None and (
            largest[0] > window.plan.batch.tokens or largest[1] > window.plan.batch.labelled):
        plan = plan_run(trainer.model, encoded, args, packed=trainer._packed, largest=largest)
        trainer.plan = window.plan = plan or window.plan
    trainer.train_dataset = Bins(bins)
    logger.info("Dynamic batching: %d batches of up to %d tokens and %d rows, instead of %d of %d rows.", len(batches),
                budget, max_batch_size, -(-len(rows) // args.per_device_train_batch_size),
                args.per_device_train_batch_size)
    args.per_device_train_batch_size = trainer._train_batch_size = 1  # an entry of the data set is a batch now
