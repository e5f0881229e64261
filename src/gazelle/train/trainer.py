"""`SFTTrainer`: supervised fine-tuning on `transformers.Trainer`.

What it adds to the base class: it prepares the data, packs rows without padding, normalises the loss by the labelled
tokens of the whole accumulated batch, and writes metrics and a report.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from gazelle.adapters.lora import add_lora
from gazelle.base.device import memory_in_use, peak_memory
from gazelle.base.errors import OptionError
from gazelle.base.files import check_writable
from gazelle.base.log import say_once
from gazelle.data.encode import Encoded
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.train.config import SFTConfig, current_names, from_training_arguments
from gazelle.train.dataset import Collator, DictRows, make_bins
from gazelle.train.loss import batch_loss
from gazelle.train.memory import choose_checkpointing
from gazelle.train.metrics import MetricsFile
from gazelle.train.prepare import Prepared, prepare
from gazelle.train.progress import Progress
from gazelle.train.report import RunFacts, write_report
from gazelle.train.samples import Sample, answer_samples, pick_samples


class SFTTrainer(Trainer):
    """Fine-tunes a causal language model on conversations, prompt–completion pairs or raw text.

    Args:
        model: from `FastLanguageModel`, or any Hugging Face causal model, with or without PEFT.
        args: `SFTConfig`, or plain `transformers.TrainingArguments`.
        train_dataset: a path, a hub name, a list of rows, a `datasets.Dataset`, or rows that are encoded already.
        eval_dataset: the same; its loss is reported at `eval_steps`, weighted by labelled tokens.
        processing_class: the tokenizer; `tokenizer=` is the older name for it.
        formatting_func: turns a row (or a batch of rows) into text.
        data_collator: replaces padding-free batches by the caller's own.
        peft_config: keyword arguments or a `peft.LoraConfig`, for a model that has no adapter yet.
        **options: fields of `SFTConfig` given directly, as older scripts do (`max_seq_length=…, packing=…`).

    Raises:
        UserError: for data, options or an output folder that cannot be used, before any training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **options: Any,
    ) -> None:
        config = from_training_arguments(args) if args is not None else SFTConfig()
        for name, value in current_names(options).items():
            setattr(config, name, value)
        tokenizer = processing_class or tokenizer
        if tokenizer is None:
            raise OptionError("the trainer needs the model's tokenizer", where="SFTTrainer", found="none",
                              expected="processing_class=tokenizer (or tokenizer=tokenizer)",
                              fix="pass the tokenizer that from_pretrained returned")
        if config.output_dir:
            check_writable(Path(config.output_dir))
        if peft_config is not None:
            model = add_lora(model, **_lora_options(peft_config))
        _match_precision(config, model)

        self.prepared: Prepared = prepare(model, tokenizer, config, train_dataset, eval_dataset, formatting_func)
        refusal = supports_packing(model)
        if refusal and data_collator is None:
            say_once(f"rows are padded instead of packed: {refusal}")
        self._packed = refusal is None and data_collator is None
        capacity = self.prepared.max_length

        def dataset(encoded: Any) -> Any:
            if encoded is None:
                return None
            if isinstance(encoded, dict):
                return {name: dataset(part) for name, part in encoded.items()}
            if data_collator is not None:
                return DictRows(encoded.examples)
            return make_bins(encoded, packing=config.packing, strategy=config.packing_strategy, capacity=capacity)

        self._use_cache_before = model.config.use_cache  # the base class turns the cache off and leaves it so
        super().__init__(
            model=model,
            args=config,
            train_dataset=dataset(self.prepared.train),
            eval_dataset=dataset(self.prepared.eval),
            processing_class=tokenizer,
            data_collator=data_collator or Collator(None if self._packed else tokenizer.pad_token_id),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our loss divides by the labelled tokens of the accumulated batch, so the base class must not divide again.
        self.model_accepts_loss_kwargs = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not config.disable_tqdm and self.prepared.report is not None:
            self.add_callback(Progress(self.prepared.report))
        if config.output_dir:
            self.add_callback(MetricsFile())
        self.samples: list[Sample] = []
        self._tokens = self._tokens_logged = 0
        self._logged_at = time.perf_counter()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, then write `report.html` and `loss.png`.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir`, or the path of one.
            **kwargs: as in `transformers.Trainer.train`.
        """
        self._check_checkpoint(resume_from_checkpoint)
        config: SFTConfig = self.args
        if config.report and config.report_samples and self.is_world_process_zero():
            self.samples = pick_samples(self.prepared.conversations, config.report_samples)
            answer_samples(self.model, self.processing_class, self.samples, "before", config.report_max_new_tokens)
        if self.prepared.train is not None and not config.gradient_checkpointing:
            choose_checkpointing(self.model, *self._largest_batch(self.prepared.train))
        started = self._logged_at = time.perf_counter()
        with self._packed_attention():
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        seconds = time.perf_counter() - started
        self.model.config.use_cache = self._use_cache_before
        if config.report and self.prepared.report is not None and self.is_world_process_zero():
            answer_samples(self.model, self.processing_class, self.samples, "after", config.report_max_new_tokens)
            write_report(config, self._facts(seconds), self.prepared.report, self.samples)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter or model and tokenizer, without the pickled arguments that the base class adds."""
        super().save_model(output_dir, _internal_call)
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

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
        if self.compute_metrics is not None or isinstance(eval_dataset or self.eval_dataset, dict):
            with self._packed_attention():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self._packed_attention():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    total, _ = batch_loss(self.model, inputs)
                sums += torch.tensor([total.item(), (inputs["labels"] != -100).sum().item()], dtype=torch.float64)
        self.model.train(was_training)
        total_sum, count = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total_sum / count,
                   f"{metric_key_prefix}_runtime": time.perf_counter() - started}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self._logged_at += time.perf_counter() - started  # time spent here does not count against training throughput
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

    def _largest_batch(self, train: Encoded) -> tuple[int, int]:
        """Tokens and labelled tokens that a micro-batch has at most."""
        rows = self.args.per_device_train_batch_size
        longest = sorted((len(row.input_ids) for row in train.examples), reverse=True)[:rows]
        labelled = sorted((sum(label != -100 for label in row.labels) for row in train.examples), reverse=True)[:rows]
        if cast(SFTConfig, self.args).packing:
            return rows * self.prepared.max_length, rows * self.prepared.max_length
        return sum(longest), sum(labelled)

    def _facts(self, seconds: float) -> RunFacts:
        parameters = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        adapter = getattr(self.model, "peft_config", {}).get("default")
        chosen = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
        return RunFacts(
            model_name=self.model.config.name_or_path,
            trainable=sum(size for size, trains in parameters if trains),
            parameters=sum(size for size, _ in parameters),
            steps=self.state.global_step, seconds=seconds, tokens=self._tokens,
            peak_memory=peak_memory(str(self.args.device)),
            adapter=adapter and {name: _plain_set(getattr(adapter, name)) for name in chosen},
        )

    @contextlib.contextmanager
    def _packed_attention(self) -> Iterator[None]:
        if not self._packed:
            yield
            return
        with packed_attention_on(self.model):
            yield

    def _check_checkpoint(self, resume: str | bool | None) -> None:
        folder = Path(str(self.args.output_dir))
        if resume is True and not (folder.is_dir() and get_last_checkpoint(str(folder))):
            raise OptionError("there is no checkpoint to resume from", where=str(folder),
                              found="no checkpoint-N folder", expected="a folder in which training was started before",
                              fix="leave resume_from_checkpoint out to start anew")
        if isinstance(resume, str) and not (Path(resume) / "trainer_state.json").is_file():
            raise OptionError("this is not a checkpoint to resume from", where=resume, found="no trainer_state.json",
                              expected="a checkpoint-N folder", fix="name one, or pass True for the newest")


def _match_precision(config: SFTConfig, model: PreTrainedModel) -> None:
    """Compute in the model's own 16-bit type on a GPU unless the caller chose one."""
    if model.device.type == "cpu" or config.bf16 or config.fp16:
        return
    config.bf16 = model.dtype == torch.bfloat16
    config.fp16 = model.dtype == torch.float16


def _plain_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _lora_options(peft_config: Any) -> dict[str, Any]:
    """The arguments of `add_lora` from a `peft.LoraConfig` or a plain dictionary."""
    if isinstance(peft_config, dict):
        return peft_config
    if type(peft_config).__name__ != "LoraConfig":
        raise OptionError("only LoRA can be set up by the trainer", where="peft_config",
                          found=type(peft_config).__name__, expected="peft.LoraConfig",
                          fix="call peft.get_peft_model yourself and pass the model")
    default = type(peft_config)()
    skipped = {"task_type", "peft_type", "base_model_name_or_path", "inference_mode"}
    return {name: value for name, value in vars(peft_config).items()
            if value != getattr(default, name) and name not in skipped}


