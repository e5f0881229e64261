"""`SFTTrainer`: supervised fine-tuning on `transformers.Trainer`.

What it adds to the base class: it prepares the data, packs rows without padding, normalises the loss by the labelled
tokens of the whole accumulated batch, and writes metrics and a report.
"""

import contextlib
import os
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
from gazelle.engine.flat import clip_
from gazelle.models.load import load_model
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.models.record import record_base
from gazelle.models.special_tokens import stop_at_end_of_turn
from gazelle.models.swap import accelerate
from gazelle.train.config import optimizer_name, with_options
from gazelle.train.dataset import Bins, Collator, DictRows, make_bins
from gazelle.train.finite import FiniteGradients
from gazelle.train.loss import batch_loss, loss_sums
from gazelle.train.memory import choose_checkpointing
from gazelle.train.metrics import MetricsFile
from gazelle.train.optimizer import HeldGradients, can_flatten, flatten
from gazelle.train.plan import RunPlan, Window, plan_run
from gazelle.train.prepare import Prepared, encode_rows, prepare
from gazelle.train.progress import Progress
from gazelle.train.record import Pushes, run_record
from gazelle.train.report import RunFacts, write_report
from gazelle.train.samples import Sample, answer_samples, pick_samples
from gazelle.train.setup import check_checkpoint, check_together, match_precision, move_without_waiting
from gazelle.train.step import GraphedStep, refuses_graph
from gazelle.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from peft import PeftConfig


class SFTTrainer(Pushes, Trainer):
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
        if config.engine:
            accelerate(model, precision="fp8" if config.precision == "fp8" else "auto")
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
        processes = int(os.environ.get("WORLD_SIZE", 1))
        self._graphed = refuses_graph(config, model, packed=self._packed, processes=processes) is None
        self.plan: RunPlan | None = None
        if self.prepared.train is not None:
            self.plan = plan_run(model, self.prepared.train, config, packed=self._packed)
        self._use_cache_before = getattr(model.config, "use_cache", None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config.remove_unused_columns = False  # what the data room hands over is all used
        self._config = config
        if model.device.type == "cuda":
            move_without_waiting(config)
        try:
            super().__init__(
                model=model,
                args=config,
                train_dataset=self._dataset(self.prepared.train),
                eval_dataset=self._dataset(self.prepared.eval),
                processing_class=tokenizer,
                data_collator=data_collator or Collator(self._packed, pad, round_up=self._graphed),
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
        self._finite: FiniteGradients | None = None
        if config.fp16 or config.precision == "fp8":
            self._finite = FiniteGradients("fp16" if config.fp16 else "fp8", scaled=self.accelerator.scaler is not None)
            self.add_callback(self._finite)
        self._stopwatch = Stopwatch(self.args.device, lambda: self._tokens, lambda: self._evaluating)
        self.add_callback(self._stopwatch)
        self._window: Window | None = None
        if self.plan is not None:
            self._window = Window(self.plan, model, self._drop_step)
            self.add_callback(self._window)
        self._held = HeldGradients(model)
        self._step: GraphedStep | None = None
        self._weights = sum(parameter.numel() for parameter in model.parameters())
        self.samples: list[Sample] = []
        self.seconds = 0.0  # that the last call of train() took, samples and report apart
        self._tokens = self._tokens_logged = self._tokens_before = 0  # the last: the present step
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
        if self.plan is None and self.prepared.train is not None and not config.gradient_checkpointing:
            choose_checkpointing(self.model, self.prepared.train, config, packed=self._packed)
        self._tokens = self._tokens_logged = 0
        self._evaluating = 0.0
        began = self._logged_at = time.perf_counter()
        try:
            planned = contextlib.nullcontext() if self.plan is None else self.plan.in_force(self.model, self._stopwatch)
            with self._packed_attention(), self._held, planned:
                if self._use_cache_before is not None:
                    self.model.config.use_cache = False
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._restore_cache(self.model)
            if self._progress is not None:
                self._progress.stop()
            if self._step is not None:
                self._step.graph.clear()
        self.seconds = time.perf_counter() - began
        if reported and self.prepared.report is not None:
            answer_samples(self.model, self.processing_class, self.samples, "after", config.report_max_new_tokens)
            write_report(config, self._facts(), self.prepared.report, self.samples)
        self.model.gazelle_run = run_record(config, self._facts(), self.prepared.report)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter or model and tokenizer, without the pickled arguments that the base class adds."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.should_save and folder.exists():
            record_base(self.model, folder)

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the base class does; trained parameters lie end to end where the optimizer takes numbers one by one."""
        target = self.model if model is None else model
        name = optimizer_name(self.args)
        if self.optimizer is None and self.args.world_size == 1 and can_flatten(target, name):
            decayed = self.get_decay_parameter_names(target)
            flats, groups = flatten(target, decayed, self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(groups, **options)
            self._held.hold(flats)
        return super().create_optimizer(model)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any],
                      num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Forward and backward of a micro-batch; with those before it again, if memory runs out on a smaller plan."""
        if self._window is None or self.args.world_size > 1:
            return self._micro_batch(model, inputs, num_items_in_batch)
        if not self._window.batches:
            self._tokens_before = self._tokens
        return self._window.run(inputs, lambda batch: self._micro_batch(model, batch, num_items_in_batch))

    def _micro_batch(self, model: torch.nn.Module, inputs: dict[str, Any],
                     num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """What the base class does to every module at every step is left out where our own batches allow it."""
        if not self._held.flats or num_items_in_batch is None or "cu_seq_lens_q" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        if not self._graphed:
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()
        if self._step is None or self._step.model is not model:
            self._step = GraphedStep(model, self.args.label_smoothing_factor)
        self._tokens += inputs["tokens"]
        return self._step(inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy over the labelled tokens of the whole accumulated batch."""
        if model.training:
            mask = inputs.get("attention_mask")
            self._tokens += inputs["tokens"] if "tokens" in inputs else inputs["labels"].numel() if mask is None \
                else int(mask.sum())
        total, output = batch_loss(model, inputs, self.args.label_smoothing_factor, logits=return_outputs)
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
        with self._packed_attention():
            batches = (self._prepare_inputs(batch) for batch in self.get_eval_dataloader(eval_dataset))
            sums = loss_sums(self.model, batches, self.compute_loss_context_manager)
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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six a weight and token, without counting the weights again at every step."""
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self._finite is not None:
            self._finite.look(model)
        if not self._held.flats or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)
        return clip_(self._held.flats, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._finite is not None:
            self._finite.look(model)
        if grad_norm is None and self._held.flats and self.accelerator.scaler is None:
            return clip_(self._held.flats, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _drop_step(self) -> None:
        """Memory ran out: let go of gradients and of graphs with their activations, and count its tokens anew."""
        self._tokens = self._tokens_before
        if self._step is not None:
            self._step.graph.clear()
        self.model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

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
            plan=self._plan_lines(),
            adapter=adapter and {name: getattr(adapter, name) for name in chosen if hasattr(adapter, name)},
        )

    def _plan_lines(self) -> list[tuple[str, str]]:
        lines = [] if self.plan is None else self.plan.lines()
        if self._finite is not None and self._finite.skipped:
            said = f"{self._finite.skipped}, the last as the gradient of {self._finite.names[0]} was not finite"
            lines.append(("skipped steps", said))
        return lines

    @contextlib.contextmanager
    def _packed_attention(self) -> Iterator[None]:
        if not self._packed:
            yield
            return
        with packed_attention_on(self.model):
            yield
