"""Runs a recipe: the calls a script would make, in the order that finds mistakes before long work starts."""

from pathlib import Path
from typing import cast

from gazelle.base.device import check_device, default_device
from gazelle.base.errors import OptionError, OutputError
from gazelle.base.files import check_writable, write_text
from gazelle.data.load import load_conversations
from gazelle.data.read import Rows, read_rows
from gazelle.data.report import DataReport
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models.context import fit_context
from gazelle.models.load import load_tokenizer
from gazelle.train.prepare import encode_rows
from gazelle.train.recipe import Recipe
from gazelle.train.trainer import SFTTrainer

LEFT_BY_A_RUN = ("adapter_model.safetensors", "metrics.jsonl", "report.html")


def check_recipe(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """Find what can be found without loading a model: the folder, the device, the settings, the rows.

    Raises:
        UserError: nothing has been written when it comes.
    """
    folder = Path(recipe.output_dir)
    check_writable(folder)
    earlier = [name for name in LEFT_BY_A_RUN if (folder / name).exists()]
    if earlier and not (resume or overwrite):
        raise OutputError("the output folder holds an earlier run", where=str(folder), found=", ".join(earlier),
                          expected="a new or empty folder",
                          fix="choose another output_dir, or pass --resume or --overwrite")
    if resume and not any(folder.glob("checkpoint-*")):
        raise OptionError("there is no checkpoint to resume from", where=str(folder), found="no checkpoint-N folder",
                          expected="a folder in which training was started before", fix="leave --resume out")
    if recipe.model.device_map:
        check_device(recipe.model.device_map)
    recipe.sft_config()
    data = recipe.data
    for source, split in ((data.train, "train"), (data.eval, "eval")):
        if source is not None:
            load_conversations(source, format=data.format, columns=data.columns, split=split, system=data.system)


def dry_run(recipe: Recipe) -> DataReport:
    """The data report of a recipe, with the model's tokenizer but without its weights."""
    tokenizer, config = load_tokenizer(recipe.model.name, revision=recipe.model.revision,
                                       trust_remote_code=recipe.model.trust_remote_code)
    train, evaluation = split_rows(recipe)
    settings = recipe.sft_config()
    settings.max_length = settings.max_length or fit_context(config, recipe.model.max_seq_length)
    report = encode_rows(tokenizer, config.model_type, settings, train, evaluation).report
    return cast(DataReport, report)  # there is one, as there are training rows


def run(recipe: Recipe, *, resume: bool = False) -> SFTTrainer:
    """Load, adapt, train and save; returns the trainer with the trained model in it.

    The adapter (or, after full fine-tuning, the checkpoint), the tokenizer, metrics, report and the recipe itself end
    up in `recipe.output_dir`.
    """
    train, evaluation = split_rows(recipe)
    options = recipe.model.model_dump(exclude={"name"})
    if options["load_in_4bit"] is None:
        # NF4 is there to save GPU memory; on a CPU it costs time and saves little.
        options["load_in_4bit"] = default_device() != "cpu" and not (recipe.model.full_finetuning
                                                                     or recipe.model.load_in_8bit)
    model, tokenizer = FastLanguageModel.from_pretrained(recipe.model.name, **options)
    if recipe.lora is not None:
        model = FastLanguageModel.get_peft_model(model, **recipe.lora.model_dump())
    trainer = SFTTrainer(model=model, args=recipe.sft_config(), train_dataset=train, eval_dataset=evaluation,
                         processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(recipe.output_dir)
    write_text(Path(recipe.output_dir) / "recipe.yaml", recipe.as_yaml())
    return trainer


def split_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Training and evaluation rows, the latter held out from the former where the recipe asks for a fraction."""
    data = recipe.data
    train = read_rows(data.train, split="train")
    if data.eval is not None:
        return train, read_rows(data.eval, split="eval")
    if not data.eval_fraction:
        return train, None
    return train.split(data.eval_fraction, seed=recipe.sft_config().seed)
