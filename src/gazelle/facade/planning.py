"""A memory plan for a model that is not loaded, from its config alone."""

from typing import Any

import torch

from gazelle.base.device import default_device, default_dtype
from gazelle.base.errors import ModelError
from gazelle.base.log import log_to_terminal
from gazelle.engine.outline import Batch
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models.context import fit_context
from gazelle.models.load import load_tokenizer
from gazelle.models.outline import meta_model
from gazelle.models.swap import accelerate, explain, runs_on_engine
from gazelle.train.plan import RunPlan, plan_outline


def plan_model(model_name: str, *, tokens_a_row: int | None = None, rows: int = 2, budget: str | int | None = None,
               r: int = 16, target_modules: list[str] | str | None = None, load_in_4bit: bool | None = None,
               load_in_8bit: bool = False, full_finetuning: bool = False, optim: str = "adamw_8bit",
               precision: str = "auto", checkpointing: bool | str = "auto", device: str | None = None) -> RunPlan:
    """What training would take. One layer with random weights is measured on the device; no weights are loaded.

    Args:
        model_name: as in `FastLanguageModel.from_pretrained`; only its config is read.
        tokens_a_row: longest row. Default: 2048, or the model's limit.
        rows: `per_device_train_batch_size`.
        budget: as `SFTConfig.memory_budget`.
        r, target_modules: of the adapter.
        load_in_4bit, load_in_8bit, full_finetuning: as in `from_pretrained`; 4 bits are the default on a GPU.
        optim, precision: as in `SFTConfig`.
        checkpointing: as `SFTConfig.use_gradient_checkpointing`.
        device: where it would train. Default: the best there is.

    Raises:
        OptionError: nothing fits into the budget.
        ModelError: the engine does not know the model's family.
    """
    log_to_terminal()
    place = torch.device(device or default_device())
    _, config = load_tokenizer(model_name)
    length = fit_context(config, tokens_a_row)
    model: Any = meta_model(config, torch.float32 if place.type == "cpu" else default_dtype())
    accelerate(model)
    if not runs_on_engine(model):
        reason = next((part.reason for part in explain(model) if part.reason), "its layers are unknown")
        raise ModelError("there is no plan for models that the engine does not run", where=model_name, found=reason,
                         expected="a family of the engine's", fix="train it: the trainer then decides by an estimate")
    if full_finetuning:
        model.requires_grad_(True)
        stored = "dense"
    else:
        model = FastLanguageModel.get_peft_model(model, r=r, target_modules=target_modules)
        four = load_in_4bit if load_in_4bit is not None else place.type != "cpu" and not load_in_8bit
        stored = "int8" if load_in_8bit else "nf4" if four else "dense"
    batch = Batch(rows * length, rows * length, length)
    return plan_outline(model, batch, place, optim=optim, precision=precision, stored=stored, budget=budget,
                        checkpointing=checkpointing)
