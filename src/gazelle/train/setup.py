"""What the trainer sorts out before it starts: precision, checkpoints to resume from, and settings that need others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gazelle.base.errors import OptionError
from gazelle.models.context import context_limit
from gazelle.train.config import SFTConfig
from gazelle.train.eval_options import check_best_metric


def match_precision(config: SFTConfig, model: PreTrainedModel) -> None:
    """Compute in the model's own 16-bit type on a GPU unless the caller chose one."""
    if config.precision in ("bf16", "fp16", "fp32"):
        config.bf16, config.fp16 = config.precision == "bf16", config.precision == "fp16"
    elif model.device.type == "cpu" or config.bf16 or config.fp16:
        return
    else:
        config.bf16 = model.dtype == torch.bfloat16
        config.fp16 = model.dtype == torch.float16
    if config.bf16 or config.fp16:
        config.mixed_precision = "bf16" if config.bf16 else "fp16"  # what the accelerator is built from


def move_without_waiting(config: SFTConfig) -> None:
    """Let the host run ahead of the GPU: batches are copied from pinned memory while the step before still runs."""
    if config.dataloader_pin_memory:
        config.accelerator_config.non_blocking = True
    config.logging_nan_inf_filter = False  # it waits for every loss; one that is not finite is shown as it is


def check_eval_rows(config: SFTConfig, has_eval: bool) -> None:
    """Raise `OptionError` if evaluation is asked for without rows to evaluate on."""
    if not has_eval and getattr(config.eval_strategy, "value", config.eval_strategy) != "no":
        raise OptionError("evaluation is asked for, but there are no evaluation rows", where="eval_strategy",
                          found=str(getattr(config.eval_strategy, "value", config.eval_strategy)),
                          expected="eval_dataset or eval_split (in a recipe data.eval or data.eval_split)",
                          fix="add evaluation rows, or set eval_strategy to \"no\"")


def check_together(config: SFTConfig, model: PreTrainedModel, eval_dataset: Any, *, has_metrics: bool) -> None:
    """Raise `OptionError` for settings that need one another, or the model, and do not have them."""
    if eval_dataset is not None and config.eval_split:
        raise OptionError("there are evaluation rows already", where="eval_split", found=str(config.eval_split),
                          expected="eval_dataset, or a share of the training rows", fix="leave one of the two out")
    if isinstance(eval_dataset, Mapping) and not eval_dataset:
        raise OptionError("there is no evaluation set", where="eval_dataset", found="an empty dictionary",
                          expected="name: rows", fix="leave eval_dataset out, or put rows in")
    check_eval_rows(config, eval_dataset is not None or config.eval_split > 0)
    check_best_metric(config, list(eval_dataset) if isinstance(eval_dataset, Mapping) else [""],
                      has_metrics=has_metrics)
    limit = context_limit(model.config)
    if config.max_length and limit and config.max_length > limit:
        raise OptionError("rows would be longer than the model takes", where="max_length", found=str(config.max_length),
                          expected=f"at most {limit}", fix=f"load the model with max_seq_length={config.max_length}, "
                          f"which stretches it, or set max_length to {limit} or less")


def check_adapter(folder: Path | None, model: Any) -> None:
    """Raise `OptionError` if the checkpoint in `folder` was made with another adapter than the model's."""
    if folder is None:
        return
    ours = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", "default"))
    saved = folder / "adapter_config.json"
    if ours is None or not saved.is_file():
        return
    theirs = json.loads(saved.read_text(encoding="utf-8"))
    for name in ("peft_type", "r", "target_modules"):
        mine, other = _plain(getattr(ours, name, None)), _plain(theirs.get(name))
        if mine != other:
            raise OptionError("the checkpoint was made with another adapter", where=f"{saved}, {name}",
                              found=str(other), expected=str(mine), fix="resume with the settings it was started with")


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, set | list) else value
