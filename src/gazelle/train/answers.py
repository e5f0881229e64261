"""Answers to a sample of evaluation rows, graded while training goes on."""

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.data.conversation import Conversation
from gazelle.data.encode import IGNORED, Encoded, Example, encode
from gazelle.data.text_metrics import corpus_score
from gazelle.models.context import context_limit
from gazelle.models.generate import generate_texts
from gazelle.train.config import SFTConfig
from gazelle.train.eval_options import graders
from gazelle.train.prepare import Prepared


class Asked(NamedTuple):
    """A row up to its last answer, as token ids, and that answer."""

    prompt: list[int]
    expected: str


class Answers:
    """Answers evaluation rows and grades what the model says.

    Args:
        config: `eval_generate` and what goes with it.
        tokenizer: the model's.
    """

    def __init__(self, config: SFTConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.graders = graders(config)
        self._tokens = config.per_device_train_batch_size * (config.max_length or 512)
        self._drawn: tuple[Prepared | None, dict[str, list[Asked]]] = None, {}

    def drawn(self, prepared: Prepared) -> dict[str, list[Asked]]:
        """Evaluation set ("" for one without a name) → `eval_samples` of its rows, always the same ones.

        Nothing where no metric is asked for.

        Raises:
            OptionError: no row of a set has an answer behind a prompt.
        """
        if self._drawn[0] is not prepared:  # rows are encoded again when a script wants other labels
            self._drawn = prepared, self._draw(prepared)
            if prepared.train is not None and not self.config.packing:
                longest = max(len(row.input_ids) for row in prepared.train.examples)
                self._tokens = self.config.per_device_train_batch_size * longest
        return self._drawn[1]

    def sample_of(self, rows: Sequence[Example] | Prepared) -> list[Asked]:
        """A sample of evaluation rows other than the trainer's own."""
        if isinstance(rows, Prepared):
            return self._draw(rows).get("", [])
        return self._sample("", Encoded(list(rows)), []) if self.graders else []

    def _draw(self, prepared: Prepared) -> dict[str, list[Asked]]:
        if not self.graders or prepared.eval is None:
            return {}
        sets = prepared.eval if isinstance(prepared.eval, dict) else {"": prepared.eval}
        return {name: self._sample(name, rows, prepared.eval_conversations.get(name, []))
                for name, rows in sets.items()}

    def grade(self, model: Any, sample: list[Asked]) -> dict[str, float]:
        """The figure of each metric over the sample, the same in all processes.

        The model, random states and training or evaluation mode are afterwards what they were.
        """
        if not sample:
            return {}
        processes = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
        rank = int(torch.distributed.get_rank()) if processes > 1 else 0
        with _same_randomness(model.device):
            mine = [(rank + processes * place, answer)
                    for place, answer in enumerate(self._answer(model, sample[rank::processes]))]
            everyone: list[Any] = [mine]
            if processes > 1:
                everyone = [None] * processes
                torch.distributed.all_gather_object(everyone, mine)
            answers = [answer for _, answer in sorted(itertools.chain(*everyone))]
            expected = [asked.expected for asked in sample]
            return {name: corpus_score(name, answers, expected) if metric is None else
                    sum(float(metric(said, wanted)) for said, wanted in zip(answers, expected, strict=True))
                    / len(sample) for name, metric in self.graders.items()}

    def _answer(self, model: Any, sample: list[Asked]) -> list[str]:
        """In batches of no more tokens than one that is trained on."""
        limit = context_limit(unwrap(model).config)
        order = sorted(range(len(sample)), key=lambda at: -len(sample[at].prompt))
        answers = [""] * len(sample)
        while order:
            longest = len(sample[order[0]].prompt)  # a table of positions has no more than so many
            most = min(self.config.eval_max_new_tokens, max(1, limit - longest) if limit else 2**31)
            rows = max(1, min(32, self._tokens // (longest + most)))
            batch, order = order[:rows], order[rows:]
            said = generate_texts(model, self.tokenizer, [sample[at].prompt for at in batch], max_new_tokens=most,
                                  batch_size=rows)
            for at, answer in zip(batch, said, strict=True):
                answers[at] = answer.strip()
        return answers

    def _sample(self, name: str, encoded: Encoded, chats: list[Conversation]) -> list[Asked]:
        order = np.random.default_rng(self.config.seed)
        rows: Sequence[Example] = encoded.examples
        chats = [chat for chat in chats if chat.text is None]
        if self.config.train_on == "all" and chats:  # whose labels do not tell where the last answer begins
            chosen = [chats[at] for at in order.permutation(len(chats))[: 2 * self.config.eval_samples]]
            rows = encode(chosen, self.tokenizer, max_length=encoded.max_length).examples
        else:
            rows = [rows[at] for at in order.permutation(len(rows))]
        sample: list[Asked] = []
        for row in rows:
            if len(sample) < self.config.eval_samples and (asked := self._cut(row, encoded.max_length)):
                sample.append(asked)
        if not sample:
            raise OptionError("no evaluation row can be answered", where=f"eval_generate{name and f', {name}'}",
                              found=f"{len(rows)} rows that are texts, or whose answer is cut at max_length",
                              expected="rows with a prompt and an answer", fix="leave eval_generate out, or raise "
                              "max_length")
        return sample

    def _cut(self, row: Example, max_length: int) -> Asked | None:
        """A row that is not cut itself, and has a prompt, cut where the labels of its last answer begin."""
        labelled = np.array(row.labels) != IGNORED
        ends = np.flatnonzero(labelled)
        if not len(ends) or len(row.input_ids) == max_length:
            return None
        before = np.flatnonzero(~labelled[: ends[-1]])
        begin = int(before[-1]) + 1
        if begin < 2:  # a text, learnt from its second token on
            return None
        answer = self.tokenizer.decode(list(row.input_ids[begin : ends[-1] + 1]), skip_special_tokens=True)
        return Asked(list(row.input_ids[:begin]), answer.strip())


@contextlib.contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """Random states of Python, NumPy, torch and the device are afterwards what they were: metrics may draw numbers."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device],
                                   device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
