"""`SFTTrainer`: supervised fine-tuning on `transformers.Trainer`.

What it adds to the base class: it prepares the data, packs rows without padding, normalises the loss by the labelled
tokens of the whole accumulated batch, and writes metrics and a report.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gazelle.adapters.config import add_adapter
from gazelle.base.device import memory_in_use, peak_memory
from gazelle.base.errors import OptionError
from gazelle.base.files import check_writable, make_readable
from gazelle.base.log import say_once
from gazelle.engine.flat import clip_
from gazelle.models.load import load_model
from gazelle.models.packed import supports_packing
from gazelle.models.record import record_base
from gazelle.models.special_tokens import stop_at_end_of_turn
from gazelle.models.swap import accelerate
from gazelle.train.answers import Answers
from gazelle.train.config import optimizer_name, with_options
from gazelle.train.dataset import Collator, padding_id
from gazelle.train.evaluation import EvaluatingTrainer
from gazelle.train.facts import run_facts
from gazelle.train.loss import batch_loss
from gazelle.train.memory import choose_checkpointing
from gazelle.train.optimizer import can_flatten, clip_finite, flatten, grouped, learning_rates
from gazelle.train.plan import RunPlan, Window, plan_run
from gazelle.train.prepare import Prepared, prepare
from gazelle.train.progress import Progress
from gazelle.train.record import Pushes, run_record
from gazelle.train.report import write_report
from gazelle.train.samples import Sample, answer_samples, pick_samples
from gazelle.train.setup import check_together, match_precision, move_without_waiting
from gazelle.train.step import GraphedStep, refuses_graph
from gazelle.train.stopwatch import Stopwatch
from gazelle.train.strategies.batching import enable_dynamic_batching
from gazelle.train.strategies.incremental import with_replay
from gazelle.train.telemetry import metrics_served
from gazelle.train.trackers import tracked

if TYPE_CHECKING:
    from peft import PeftConfig


class SFTTrainer(Pushes, EvaluatingTrainer):
    """Fine-tunes a causal language model on conversations, prompt–completion pairs or raw text.

    Args:
        model: from `FastLanguageModel`, or any Hugging Face causal model, with or without PEFT, or the name of one.
        args: `SFTConfig`, or plain `transformers.TrainingArguments`.
        train_dataset: a path, a hub name, a list of rows, a `datasets.Dataset`, or rows that are encoded already.
        eval_dataset: the same; its loss is reported at `eval_steps`, weighted by labelled tokens. Else `eval_split`.
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
        check_together(config, model, eval_dataset, has_metrics=compute_metrics is not None)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        match_precision(config, model)
        if config.engine:
            accelerate(model, precision="fp8" if config.precision == "fp8" else "auto")
        self.prepared: Prepared = prepare(model, tokenizer, config, train_dataset, eval_dataset, formatting_func)
        self._answers = Answers(config, tokenizer)
        stop_at_end_of_turn(model, tokenizer)
        replayed = with_replay(model, self.prepared.train)

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
        config.remove_unused_columns = False  # what the data room hands over is all used
        if config.data_seed is None:
            config.data_seed = config.seed  # accelerate would take whatever torch was last seeded with
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
                data_collator=data_collator or Collator(self._packed, padding_id(tokenizer), round_up=self._graphed),
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
        if replayed is not None:
            self.add_callback(replayed)
        self.guard(config, self.prepared.report)
        self._stopwatch = Stopwatch(self.args.device, lambda: self.tokens, lambda: self.evaluating)
        self.add_callback(self._stopwatch)
        self._window: Window | None = None
        if self.plan is not None:
            self._window = Window(self.plan, model, self._drop_step)
            self.add_callback(self._window)
        self._step: GraphedStep | None = None
        self._weights = sum(parameter.numel() for parameter in model.parameters())
        self.samples: list[Sample] = []
        self.seconds = 0.0  # that the last call of train() took, samples and report apart
        self.tokens = self._tokens_logged = self._tokens_before = 0  # trained by the last call; before this step
        self.evaluating = 0.0  # seconds of it
        self._logged_at = time.perf_counter()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train, then write `report.html` and `loss.png`.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir`, or the path of one.
            **kwargs: as in `transformers.Trainer.train`.
        """
        with self.taken_up(resume_from_checkpoint) as resume:
            return self._train(resume, **kwargs)

    def _train(self, resume: Path | None, **kwargs: Any) -> Any:
        config = self._config
        self._answers.drawn(self.prepared)  # complains before anything is done
        reported = config.report and self.prepared.report is not None and self.is_world_process_zero()
        if reported and config.report_samples:
            self.samples = pick_samples(self.prepared.conversations, config.report_samples)
            answer_samples(self.model, self.processing_class, self.samples, "before", config.report_max_new_tokens)
        if self.plan is None and self.prepared.train is not None and not config.gradient_checkpointing:
            choose_checkpointing(self.model, self.prepared.train, config, packed=self._packed)
        self.tokens = self._tokens_logged = 0
        self.evaluating = 0.0
        began = self._logged_at = time.perf_counter()
        try:
            planned = contextlib.nullcontext() if self.plan is None else self.plan.in_force(self.model, self._stopwatch)
            with tracked(self, resume), self._packed_attention(), self._held, planned, \
                    metrics_served(self, config.metrics_port):
                if self._use_cache_before is not None:
                    self.model.config.use_cache = False
                result = self.train_on(resume, **kwargs)
        finally:
            self._restore_cache(self.model)
            if self._progress is not None:
                self._progress.stop()
            if self._step is not None:
                self._step.graph.clear()
        self.seconds = time.perf_counter() - began
        if reported and self.prepared.report is not None:
            answer_samples(self.model, self.processing_class, self.samples, "after", config.report_max_new_tokens)
            write_report(config, run_facts(self), self.prepared.report, self.samples)
        self.model.gazelle_run = run_record(config, run_facts(self), self.prepared)
        return result

    def enable_dynamic_batching(self, max_batch_size: int = 8, timeout: float | None = None,
                                max_tokens: int | None = None) -> None:
        """Batches of as many rows as a budget of tokens takes: see `train.strategies.batching`."""
        enable_dynamic_batching(self, max_batch_size, timeout, max_tokens)

    def rolled_back(self) -> None:
        super().rolled_back()
        if self._progress is not None:
            self._progress.stop()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter or model and tokenizer, without the pickled arguments that the base class adds."""
        kept, self.args.eval_generate = self.args.eval_generate, None  # functions of a script cannot be pickled
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.args.eval_generate = kept
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.should_save and folder.exists():
            record_base(self.model, folder)
            make_readable(*folder.glob("*.safetensors"))

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the base class does; trained parameters lie end to end where the optimizer takes numbers one by one."""
        target = self.model if model is None else model
        name = optimizer_name(self.args)
        rates = learning_rates(target, self._config)
        layout = self._checkpoints.layout(self._checkpoints.resumed)
        flat = self.args.world_size == 1 and can_flatten(target, name) and layout != "parameters"
        if self.optimizer is None and (flat or rates):
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = grouped(target, self.get_decay_parameter_names(target), self.args.weight_decay, rates)
            if flat:
                flats, groups = flatten(groups)
            self.optimizer = kind(groups, **options)
            self._held.hold(flats if flat else [])
        return super().create_optimizer(model)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any],
                      num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Forward and backward of a micro-batch; with those before it again, if memory runs out on a smaller plan."""
        if self.args.world_size > 1:
            return self._micro_batch(model, inputs, num_items_in_batch)
        if self._window is None:
            loss = self._micro_batch(model, inputs, num_items_in_batch)
        else:
            if not self._window.batches:
                self._tokens_before = self.tokens
            loss = self._window.run(inputs, lambda batch: self._micro_batch(model, batch, num_items_in_batch))
        self._spikes.add_loss(loss)
        return loss

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
        self.tokens += inputs["tokens"]
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
            self.tokens += inputs["tokens"] if "tokens" in inputs else inputs["labels"].numel() if mask is None \
                else int(mask.sum())
        total, output = batch_loss(model, inputs, self.args.label_smoothing_factor, logits=return_outputs)
        count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        loss = total / torch.as_tensor(count).clamp(min=1)  # rows without a label are nothing, not nothing by nothing
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is over all processes, which DDP then averages
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with tokens per second since the last training line and memory in use, in GB, added."""
        if "loss" in logs:
            now = time.perf_counter()
            device = str(self.args.device)
            logs["tokens_per_second"] = round((self.tokens - self._tokens_logged) / (now - self._logged_at), 1)
            logs["memory_gb"] = round(memory_in_use(device) / 1e9, 3)
            logs["peak_memory_gb"] = round(peak_memory(device) / 1e9, 3)
            self._tokens_logged, self._logged_at = self.tokens, now
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six a weight and token, without counting the weights again at every step."""
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._spikes.norm = self._clip(model, self.args.max_grad_norm, super()._clip_grad_norm)
        return self._spikes.norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._spikes.norm = grad_norm = self._clip(model, float("inf"), super()._get_grad_norm)
        return grad_norm

    def _clip(self, model: torch.nn.Module, most: float, otherwise: Callable[[torch.nn.Module], Any]) -> Any:
        if self.accelerator.scaler is not None or self.accelerator.distributed_type != "NO":
            self._spikes.before_clipping(model)
            return otherwise(model)
        return clip_(self._held.flats, most) if self._held.flats else clip_finite(model.parameters(), most)

    def _drop_step(self) -> None:
        """Memory ran out: let go of gradients and of graphs with their activations, and count its tokens anew."""
        self.tokens = self._tokens_before
        if self._step is not None:
            self._step.graph.clear()
        self.model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _restore_cache(self, model: Any) -> None:
        """The base class turns the cache off for good; answering needs it."""
        if self._use_cache_before is not None:
            model.config.use_cache = self._use_cache_before
