"""Memory plans for models that are not loaded, from their configs alone."""

from typing import Any, cast

import torch

from gazelle.base.device import default_device, default_dtype
from gazelle.base.errors import ModelError
from gazelle.base.log import log_to_terminal
from gazelle.data.encode import Encoded
from gazelle.data.load import Loaded
from gazelle.engine.fp8 import check_fp8
from gazelle.engine.outline import Batch
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models import options
from gazelle.models.context import fit_context
from gazelle.models.load import load_config, load_tokenizer
from gazelle.models.outline import meta_model
from gazelle.models.swap import accelerate, explain, runs_on_engine
from gazelle.train.config import SFTConfig, optimizer_name
from gazelle.train.memory import largest_batch
from gazelle.train.plan import RunPlan, asked_checkpointing, plan_outline
from gazelle.train.prepare import encode_rows
from gazelle.train.recipe import Recipe


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
        OptionError: nothing fits into the budget, or an option that training would refuse.
        ModelError: the engine does not know the model's family.
    """
    log_to_terminal()
    place = torch.device(device or default_device())
    settings = SFTConfig(per_device_train_batch_size=rows, memory_budget=budget, optim=optim, precision=precision,
                         use_gradient_checkpointing=checkpointing)
    options.bits(load_in_4bit, load_in_8bit, full_finetuning, "nf4")
    if precision == "fp8":
        check_fp8(place)
    config = load_config(model_name)
    length = fit_context(config, tokens_a_row)
    model = without_weights(config, place)
    if reason := refusal(model):
        raise ModelError("there is no plan for models that the engine does not run", where=model_name, found=reason,
                         expected="a family of the engine's", fix="train it: the trainer then decides by an estimate")
    if full_finetuning:
        model.requires_grad_(True)
    else:
        model = FastLanguageModel.get_peft_model(model, r=r, target_modules=target_modules)
    stored = _stored(place, four=load_in_4bit, eight=load_in_8bit, full=full_finetuning)
    batch = Batch(rows * length, rows * length, length)
    return plan_outline(model, batch, place, optim=optimizer_name(settings), precision=precision, stored=stored,
                        budget=budget, checkpointing=checkpointing)


def check_budget(recipe: Recipe, rows: Loaded) -> None:
    """Find a memory budget that is too small for a recipe and its training rows, before any weights are loaded.

    Does nothing without a budget, and for models that the engine does not run.

    Raises:
        OptionError: nothing fits into the budget.
    """
    settings, asked = recipe.sft_config(), recipe.model
    if settings.memory_budget is None or not settings.engine:
        return
    place = torch.device(asked.device_map or default_device())
    tokenizer, config = load_tokenizer(asked.name, revision=asked.revision, trust_remote_code=asked.trust_remote_code)
    model = without_weights(config, place)
    if refusal(model):
        return
    full = recipe.lora is None
    model = model.requires_grad_(True) if full else FastLanguageModel.get_peft_model(model, **recipe.lora_options())
    if refusal(model):
        return
    settings.max_length = settings.max_length or fit_context(config, asked.max_seq_length)
    encoded = cast(Encoded, encode_rows(tokenizer, config.model_type, settings, rows, None).train)
    tokens, labelled = largest_batch(encoded, settings, packed=True)
    plan_outline(model, Batch(tokens, labelled, min(tokens, settings.max_length)), place,
                 optim=optimizer_name(settings), precision=settings.precision,
                 stored=_stored(place, four=asked.load_in_4bit, eight=asked.load_in_8bit, full=full),
                 budget=settings.memory_budget, checkpointing=asked_checkpointing(model, settings), measured=False)


def without_weights(config: Any, place: torch.device) -> Any:
    """A model on the meta device, accelerated where the engine knows it."""
    model = meta_model(config, torch.float32 if place.type == "cpu" else default_dtype())
    accelerate(model)
    return model


def refusal(model: Any) -> str:
    """Why the engine does not run a model; empty if it does."""
    if runs_on_engine(model):
        return ""
    return next((part.reason for part in explain(model) if part.reason), "its layers are unknown")


def _stored(place: torch.device, *, four: bool | None, eight: bool, full: bool) -> str:
    """How layers' weights are kept. 4 bits are the default on a GPU: NF4 is there to save its memory."""
    if full:
        return "dense"
    if eight:
        return "int8"
    return "nf4" if (place.type != "cpu" if four is None else four) else "dense"
