"""`EvaluatingTrainer`: loss, perplexity and graded answers of evaluation rows. No logits are kept."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from gazelle.models.packed import packed_attention_on
from gazelle.train.answers import Answers, Asked
from gazelle.train.config import SFTConfig
from gazelle.train.dataset import Bins, DictRows, rows_as_dataset
from gazelle.train.loss import loss_sums
from gazelle.train.prepare import Prepared, encode_rows
from gazelle.train.surviving import SurvivingTrainer


class EvaluatingTrainer(SurvivingTrainer):
    """What `SFTTrainer` builds on, which sets these up."""

    prepared: Prepared
    _config: SFTConfig
    _own_collator: Any
    _packed: bool
    _answers: Answers
    _logged_at: float
    evaluating: float

    @torch.random.fork_rng(devices=())  # data loaders draw a number: training is to be the same without evaluation
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and perplexity over all labelled tokens, and the metrics of `eval_generate` over a sample of answers.

        Every token counts once, however rows are batched.
        """
        drawn = self._answers.drawn(self.prepared)
        sample = drawn.get("", [])
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict):
            sample = drawn.get(eval_dataset, [])
            eval_dataset = self.eval_dataset[eval_dataset]
        elif isinstance(eval_dataset, Bins | DictRows) and eval_dataset is not self.eval_dataset:
            sample = self._answers.sample_of(eval_dataset.rows if isinstance(eval_dataset, DictRows) else
                                             list(itertools.chain(*eval_dataset.bins)))
        elif eval_dataset is not None and not isinstance(eval_dataset, Bins | DictRows | dict):
            encoded = self._encode(eval_dataset)
            sample = self._answers.sample_of(encoded)
            eval_dataset = self._dataset(encoded.eval)
        if self.compute_metrics is not None or isinstance(eval_dataset or self.eval_dataset, dict):
            with self._packed_attention():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.perf_counter()
        figures = self._figures(eval_dataset, sample)
        seconds = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_runtime"] = seconds
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        # Time spent here does not count against the throughput of training.
        self._logged_at += seconds
        self.evaluating += seconds
        return metrics

    def _figures(self, eval_dataset: Any, sample: list[Asked]) -> dict[str, float]:
        with self._packed_attention():
            batches = (self._prepare_inputs(batch) for batch in self.get_eval_dataloader(eval_dataset))
            sums = loss_sums(self.model, batches, self.compute_loss_context_manager)
        total, count = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        mean = total / count if count else float("nan")
        with self.compute_loss_context_manager():
            grades = self._answers.grade(self.model, sample)
        return {"loss": mean, "perplexity": math.exp(mean) if not mean > 700 else math.inf, **grades}

    def _dataset(self, encoded: Any) -> Any:
        """Encoded rows as the data set that the batches are made from."""
        return rows_as_dataset(encoded, self._config, self._own_collator, self.prepared.max_length)

    def _encode(self, source: Any) -> Prepared:
        """Evaluation rows that came after the trainer was made."""
        return encode_rows(self.processing_class, self.model.config.model_type, self._config, None, source,
                           headers=self.prepared.headers)

    @contextlib.contextmanager
    def _packed_attention(self) -> Iterator[None]:
        if not self._packed:
            yield
            return
        with packed_attention_on(self.model):
            yield
