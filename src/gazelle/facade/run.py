"""Runs a recipe: the calls a script would make, in the order that finds mistakes before long work starts."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gazelle.base.device import check_device, default_device
from gazelle.base.errors import OptionError, OutputError
from gazelle.base.files import check_writable, write_text
from gazelle.base.lock import check_unlocked, folder_lock
from gazelle.data.holdout import hold_out
from gazelle.data.load import Loaded, load_conversations
from gazelle.data.read import Rows, read_rows
from gazelle.data.report import DataReport
from gazelle.facade.language_model import FastLanguageModel
from gazelle.facade.planning import check_budget
from gazelle.models.card import drop_card, write_card
from gazelle.models.context import fit_context
from gazelle.models.load import load_tokenizer
from gazelle.train.checkpoint import find_checkpoint, recover
from gazelle.train.eval_options import check_best_metric
from gazelle.train.prepare import encode_rows
from gazelle.train.recipe import Recipe
from gazelle.train.setup import check_eval_rows
from gazelle.train.trainer import SFTTrainer

# What a run writes into its folder. What else lies there is somebody's and stays.
LEFT_BY_A_RUN = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "metrics.jsonl", "report.html", "loss.png", "recipe.yaml", "scores.json",
    "gazelle.json", "replay.json", "tracking.json", "checkpoint-[0-9]*", ".checkpoint-[0-9]*",
)


@dataclass(frozen=True)
class Checked:
    """The conversations of a recipe, whose mistakes have been looked for."""

    train: Loaded
    evaluation: Loaded | None


def check_recipe(recipe: Recipe) -> Checked:
    """Find what can be found without loading a model or writing: the device, the settings, the rows.

    Raises:
        UserError: naming recipe key or row.
    """
    if recipe.model.device_map:
        check_device(recipe.model.device_map)
    config = recipe.sft_config()
    data = recipe.data
    has_eval = data.eval is not None or data.eval_split > 0
    check_eval_rows(config, has_eval)
    if config.eval_generate and not has_eval:
        raise OptionError("answers are to be graded, but there are no evaluation rows", where="train.eval_generate",
                          found=" ".join(map(str, [config.eval_generate] if isinstance(config.eval_generate, str)
                                             else config.eval_generate)),
                          expected="data.eval or data.eval_split", fix="set data.eval_split: 0.1, say")
    check_best_metric(config, [""], has_metrics=False)

    def conversations(rows: Rows) -> Loaded:
        return load_conversations(rows, format=data.format, columns=data.columns, system=data.system)

    train = read_rows(data.train, split="train")
    if data.eval is not None:
        evaluation = read_rows(data.eval, split="eval")
    elif data.eval_split:
        return Checked(*hold_out(conversations(train), data.eval_split, seed=config.seed, rows=train,
                                 column=data.eval_group_column))
    else:
        return Checked(conversations(train), None)
    return Checked(conversations(train), conversations(evaluation))


def check_folder(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """Find what is wrong with the output folder.

    Raises:
        OutputError: it cannot be written to, holds an earlier run or one that still goes on, or is the model's own.
        OptionError: nothing sound to resume from.
    """
    folder = Path(recipe.output_dir)
    check_writable(folder)
    if folder.exists():
        check_unlocked(folder)
    if folder.exists() and Path(recipe.model.name).exists() and folder.resolve() == Path(recipe.model.name).resolve():
        raise OutputError("the output folder is the model's own", where=str(folder), found=recipe.model.name,
                          expected="another folder", fix="choose another output_dir")
    earlier = [path.name for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)]
    if earlier and not (resume or overwrite):
        raise OutputError("the output folder holds an earlier run", where=str(folder), found=", ".join(earlier),
                          expected="a new or empty folder",
                          fix="choose another output_dir, or pass --resume or --overwrite")
    if resume and folder.exists():
        with folder_lock(folder):
            recover(folder)
    find_checkpoint(resume, recipe.output_dir, thorough=False)


def dry_run(recipe: Recipe) -> DataReport:
    """The data report of a recipe, with the model's tokenizer but without its weights."""
    rows = check_recipe(recipe)
    tokenizer, config = load_tokenizer(recipe.model.name, revision=recipe.model.revision,
                                       trust_remote_code=recipe.model.trust_remote_code)
    settings = recipe.sft_config()
    settings.max_length = settings.max_length or fit_context(config, recipe.model.max_seq_length)
    report = encode_rows(tokenizer, config.model_type, settings, rows.train, rows.evaluation).report
    return cast(DataReport, report)  # there is one, as there are training rows


def run(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False,
    before_training: Callable[[Any, Any], None] | None = None,
) -> SFTTrainer:
    """Check, load, adapt, train and save; returns the trainer with the trained model in it.

    The adapter (or, after full fine-tuning, the checkpoint), the tokenizer, metrics, report and the recipe itself end
    up in `recipe.output_dir`.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the folder.
        overwrite: clear away what an earlier run left in the folder, once everything has been checked.
        before_training: called with the loaded model and its tokenizer, before the adapter is put on.

    Raises:
        UserError: before any training.
    """
    check_folder(recipe, resume=resume, overwrite=overwrite)
    rows = check_recipe(recipe)
    check_budget(recipe, rows.train)
    options = recipe.model.model_dump(exclude={"name"})
    if options["load_in_4bit"] is None and (recipe.model.device_map or default_device()) == "cpu":
        options["load_in_4bit"] = False  # NF4 is there to save GPU memory; a CPU would pay for it with time
    model, tokenizer = FastLanguageModel.from_pretrained(recipe.model.name, **options)
    if before_training is not None:
        before_training(model, tokenizer)
    if recipe.lora is not None:
        model = FastLanguageModel.get_peft_model(model, **recipe.lora_options())
    trainer = SFTTrainer(model=model, args=recipe.sft_config(), train_dataset=rows.train,
                         eval_dataset=rows.evaluation, processing_class=tokenizer)
    with folder_lock(Path(recipe.output_dir)):
        if overwrite and not resume:
            clear_earlier_run(Path(recipe.output_dir))
        trainer.train(resume_from_checkpoint=resume or None)
        drop_card(Path(recipe.output_dir))
        trainer.save_model(recipe.output_dir)
        write_text(Path(recipe.output_dir) / "recipe.yaml", recipe.as_yaml())
        library = "transformers" if recipe.lora is None else "peft"
        write_card(Path(recipe.output_dir), trainer.model, library=library, files=[],
                   run_folder=Path(recipe.output_dir))
    return trainer


def clear_earlier_run(folder: Path) -> None:
    """Delete what a run writes: half of the old run beside half of the new one would load as neither."""
    for pattern in LEFT_BY_A_RUN:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
