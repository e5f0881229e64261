"""`SFTTrainer`: supervised fine-tuning on `transformers.Trainer`.

What it adds to the base class: it prepares the data, packs rows without padding, normalises the loss by the labelled
tokens of the whole accumulated batch, and writes metrics and a report.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gazelle.adapters.config import add_adapter
from gazelle.base.device import memory_in_use, peak_memory
from gazelle.base.errors import OptionError
from gazelle.base.files import check_writable
from gazelle.base.log import say_once
from gazelle.models.load import load_model
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.models.record import record_base
from gazelle.models.special_tokens import stop_at_end_of_turn
from gazelle.train.config import with_options
from gazelle.train.dataset import Bins, Collator, DictRows, make_bins
from gazelle.train.loss import batch_loss
from gazelle.train.memory import choose_checkpointing
from gazelle.train.metrics import MetricsFile
from gazelle.train.prepare import Prepared, encode_rows, prepare
from gazelle.train.progress import Progress
from gazelle.train.report import RunFacts, write_report
from gazelle.train.samples import Sample, answer_samples, pick_samples
from gazelle.train.setup import check_checkpoint, check_together, match_precision

if TYPE_CHECKING:
    from peft import PeftConfig


class SFTTrainer(Trainer):
    """Fine-tunes a causal language model on conversations, prompt–completion pairs or raw text.

    Args:
        model: from `FastLanguageModel`, or any Hugging Face causal model, with or without PEFT, or the name of one.
        args: `SFTConfig`, or plain `transformers.TrainingArguments`.
        train_dataset: a path, a hub name, a list of rows, a `datasets.Dataset`, or rows that are encoded already.
        eval_dataset: the same; its loss is reported at `eval_steps`, weighted by labelled tokens.
        processing_class: the tokenizer; `tokenizer=` is the older name for it.
        formatting_func: turns a row (or a batch of rows) into text.
        data_collator: replaces padding-free batches by the caller's own.
        peft_config: a `peft.LoraConfig` or another of PEFT's, for a model that has no adapter yet.
        compute_metrics, preprocess_logits_for_metrics: as in `transformers.Trainer`.
        **options: fields of `SFTConfig` given directly, as older scripts do (`max_seq_length=…, packing=…`).

    Raises:
        UserError: for data, options or an output folder that cannot be used, before any training.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        peft_config: "PeftConfig | None" = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **options: Any,
    ) -> None:
        config = with_options(args, options)
        if isinstance(model, str):
            model, loaded = load_model(model, max_seq_length=config.max_length)
            processing_class = processing_class or tokenizer or loaded
        tokenizer = processing_class or tokenizer
        if tokenizer is None:
            raise OptionError("the trainer needs the model's tokenizer", where="SFTTrainer", found="none",
                              expected="processing_class=tokenizer (or tokenizer=tokenizer)",
                              fix="pass the tokenizer that from_pretrained returned")
        if config.output_dir:
            check_writable(Path(config.output_dir))
        check_together(config, model, has_eval=eval_dataset is not None, has_metrics=compute_metrics is not None)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        match_precision(config, model)
        self.prepared: Prepared = prepare(model, tokenizer, config, train_dataset, eval_dataset, formatting_func)
        stop_at_end_of_turn(model, tokenizer)

        self._own_collator = data_collator
        refusal = "NEFTune's noise is scaled by the length of a padded row" if config.neftune_noise_alpha else None
        refusal = refusal or supports_packing(model)
        if refusal and data_collator is None:
            say_once(f"rows are padded instead of packed: {refusal}")
        if config.packing and data_collator is not None:
            say_once("packing=True has no effect with a data_collator of your own")
        self._packed = refusal is None and data_collator is None
        self._use_cache_before = getattr(model.config, "use_cache", None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config.remove_unused_columns = False  # what the data room hands over is all used
        self._config = config
        try:
            super().__init__(
                model=model,
                args=config,
                train_dataset=self._dataset(self.prepared.train),
                eval_dataset=self._dataset(self.prepared.eval),
                processing_class=tokenizer,
                data_collator=data_collator or Collator(self._packed, pad),
                compute_metrics=compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        except (ValueError, ImportError, RuntimeError) as error:
            raise OptionError("the training settings do not go together", where="SFTConfig",
                              found=str(error).splitlines()[0], expected="settings that transformers can combine",
                              fix="change the option named above") from error
        finally:
            self._restore_cache(model)
        # Our loss divides by the labelled tokens of the accumulated batch, so the base class must not divide again.
        self.model_accepts_loss_kwargs = True
        self.args._n_gpu = 1  # no DataParallel: it would cut packed batches into pieces; several GPUs go by torchrun
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._progress = None
        if not config.disable_tqdm and self.prepared.report is not None:
            self._progress = Progress(self.prepared.report)
            self.add_callback(self._progress)
        if config.output_dir:
            self.add_callback(MetricsFile())
        self.samples: list[Sample] = []
        self.seconds = 0.0  # that the last call of train() took, samples and report apart
        self._tokens = self._tokens_logged = 0
        self._evaluating = 0.0  # seconds
        self._logged_at = time.perf_counter()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train, then write `report.html` and `loss.png`.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir`, or the path of one.
            **kwargs: as in `transformers.Trainer.train`.
        """
        config = self._config
        check_checkpoint(resume_from_checkpoint, str(config.output_dir), self.model)
        reported = config.report and self.prepared.report is not None and self.is_world_process_zero()
        if reported and config.report_samples:
            self.samples = pick_samples(self.prepared.conversations, config.report_samples)
            answer_samples(self.model, self.processing_class, self.samples, "before", config.report_max_new_tokens)
        if self.prepared.train is not None and not config.gradient_checkpointing:
            choose_checkpointing(self.model, self.prepared.train, config, packed=self._packed)
        self._tokens = self._tokens_logged = 0
        self._evaluating = 0.0
        began = self._logged_at = time.perf_counter()
        try:
            with self._packed_attention():
                if self._use_cache_before is not None:
                    self.model.config.use_cache = False
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._restore_cache(self.model)
            if self._progress is not None:
                self._progress.stop()
        self.seconds = time.perf_counter() - began
        if reported and self.prepared.report is not None:
            answer_samples(self.model, self.processing_class, self.samples, "after", config.report_max_new_tokens)
            write_report(config, self._facts(), self.prepared.report, self.samples)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter or model and tokenizer, without the pickled arguments that the base class adds."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.should_save and (folder / "adapter_config.json").exists():
            record_base(self.model, folder)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy over the labelled tokens of the whole accumulated batch."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["labels"].numel() if mask is None else int(mask.sum())
        total, output = batch_loss(model, inputs, self.args.label_smoothing_factor)
        count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is over all processes, which DDP then averages
        return (loss, output) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss over all labelled tokens of the evaluation rows: every token counts once, however rows are batched."""
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is not None and not isinstance(eval_dataset, Bins | DictRows | dict):
            eval_dataset = self._dataset(self._encode(eval_dataset))
        if self.compute_metrics is not None or isinstance(eval_dataset or self.eval_dataset, dict):
            with self._packed_attention():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        try:
            with torch.no_grad(), self._packed_attention():
                for batch in self.get_eval_dataloader(eval_dataset):
                    inputs = self._prepare_inputs(batch)
                    with self.compute_loss_context_manager():
                        total, _ = batch_loss(self.model, inputs)
                    sums += torch.tensor([total.item(), (inputs["labels"] != -100).sum().item()], dtype=torch.float64)
        finally:
            self.model.train(was_training)
        total_sum, count = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        seconds = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_loss": total_sum / count, f"{metric_key_prefix}_runtime": seconds}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        # Time spent here does not count against the throughput of training.
        self._logged_at += seconds
        self._evaluating += seconds
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with tokens per second since the last training line and memory in use, in GB, added."""
        if "loss" in logs:
            now = time.perf_counter()
            device = str(self.args.device)
            logs["tokens_per_second"] = round((self._tokens - self._tokens_logged) / (now - self._logged_at), 1)
            logs["memory_gb"] = round(memory_in_use(device) / 1e9, 3)
            logs["peak_memory_gb"] = round(peak_memory(device) / 1e9, 3)
            self._tokens_logged, self._logged_at = self._tokens, now
        super().log(logs, start_time)

    def _dataset(self, encoded: Any) -> Any:
        """Encoded rows as the data set that the batches are made from."""
        if encoded is None:
            return None
        if isinstance(encoded, dict):
            return {name: self._dataset(part) for name, part in encoded.items()}
        if self._own_collator is not None:
            makes_labels = isinstance(self._own_collator, DataCollatorForLanguageModeling)
            return DictRows(encoded.examples, labels=not makes_labels)
        return make_bins(encoded, packing=self._config.packing, strategy=self._config.packing_strategy,
                         capacity=self.prepared.max_length)

    def _encode(self, source: Any) -> Any:
        """Evaluation rows that came after the trainer was made."""
        return encode_rows(self.processing_class, self.model.config.model_type, self._config, None, source).eval

    def _restore_cache(self, model: Any) -> None:
        """The base class turns the cache off for good; answering needs it."""
        if self._use_cache_before is not None:
            model.config.use_cache = self._use_cache_before

    def _facts(self) -> RunFacts:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        adapter = getattr(self.model, "peft_config", {}).get(getattr(self.model, "active_adapter", "default"))
        chosen = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
        return RunFacts(
            model_name=self.model.config.name_or_path,
            trainable=sum(size for size, trains in sizes if trains),
            parameters=sum(size for size, _ in sizes),
            steps=self.state.global_step, seconds=self.seconds, tokens=self._tokens,
            tokens_per_second=self._tokens / max(self.seconds - self._evaluating, 1e-9),
            peak_memory=peak_memory(str(self.args.device)),
            adapter=adapter and {name: getattr(adapter, name) for name in chosen if hasattr(adapter, name)},
        )

    @contextlib.contextmanager
    def _packed_attention(self) -> Iterator[None]:
        if not self._packed:
            yield
            return
        with packed_attention_on(self.model):
            yield
