"""`recommend`: a recipe for a file of rows and a model, from the data report and the memory plan, with its reasons."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from gazelle.base.device import default_device
from gazelle.base.errors import DataError, OptionError, OutputError
from gazelle.base.files import check_writable, write_text
from gazelle.base.sizes import gigabytes, parse_bytes
from gazelle.data.encode import Encoded
from gazelle.data.holdout import hold_out
from gazelle.data.load import Loaded, load_conversations
from gazelle.data.report import DataReport
from gazelle.engine.keep import KEEP
from gazelle.engine.outline import Batch
from gazelle.facade import rules
from gazelle.facade.language_model import FastLanguageModel
from gazelle.facade.planning import refusal, without_weights
from gazelle.facade.rules import Choice
from gazelle.models.context import context_limit
from gazelle.models.load import load_tokenizer
from gazelle.train.config import SFTConfig, optimizer_name
from gazelle.train.memory import largest_batch
from gazelle.train.plan import RunPlan, plan_outline
from gazelle.train.prepare import encode_rows
from gazelle.train.recipe import Recipe, parse_recipe

SECTIONS = ("model", "lora", "data", "train")
UNPLANNED = 2  # rows of a micro-batch where there is no plan
FAR = 2**20  # tokens, for a model without a limit: rows are not to be cut before their lengths are known
ON_CPU = "a CPU computes in 32 bits; 4 bits would cost it time"


@dataclass(frozen=True)
class Recommendation:
    """What is proposed.

    Attributes:
        choices: every option of the recipe, in order, each with its reason.
        report: of the data.
        plan: the memory plan; None for a model that the engine does not run.
        output_dir: where the recipe trains to.
    """

    choices: list[Choice]
    report: DataReport
    plan: RunPlan | None
    output_dir: str

    def recipe(self) -> Recipe:
        """As `gazelle.facade.run.run` takes it."""
        return parse_recipe(yaml.safe_load(self.as_yaml()), "recommendation")

    def as_yaml(self, folder: Path | None = None) -> str:
        """The recipe with its reasons as comments; paths below `folder` are written as seen from there."""
        lines = ["# Proposed by `gazelle recommend`. Each value stands below its reason; change what you know better."]
        for section in SECTIONS:
            lines.append(f"{section}:")
            for choice in (choice for choice in self.choices if choice.section == section):
                value = _seen_from(folder, choice.value) if choice.option in ("name", "train") else choice.value
                lines += [f"  # {choice.reason}"] if choice.reason else []
                lines += ["  " + line for line in yaml.safe_dump({choice.option: value}, width=1000).splitlines()]
        return "\n".join([*lines, *yaml.safe_dump({"output_dir": self.output_dir}, width=1000).splitlines()]) + "\n"

    def value(self, section: str, option: str) -> Any:
        """What is proposed for an option."""
        return next(item.value for item in self.choices if (item.section, item.option) == (section, option))


def recommend(data: str | Path, model: str | Path, *, budget: str | int | None = None) -> Recommendation:
    """Propose a recipe. The model's config and tokenizer are read, its weights are not.

    Args:
        data: file, folder or hub name of the rows.
        model: hub name, folder or GGUF file.
        budget: memory that training may take, such as "12GB". Default: what is free.

    Raises:
        DataError: there are no such rows, or they cannot be used.
        ModelError: there is no such model.
        OptionError: no plan fits into the budget.
    """
    data, model = str(data), str(model)
    if budget is not None:
        parse_bytes(budget, "--budget")
    loaded = load_conversations(data)
    tokenizer, config = load_tokenizer(model)
    limit = context_limit(config)
    text = all(chat.text is not None for chat in loaded.conversations)

    def encoded(length: int) -> tuple[Encoded, DataReport]:
        prepared = encode_rows(tokenizer, config.model_type, SFTConfig(max_length=length), loaded, None)
        return cast(Encoded, prepared.train), cast(DataReport, prepared.report)

    rows, report = encoded(min(limit or FAR, FAR) if not text else rules.length(0, limit, text=True)[0])
    longest = report.train.quantiles["max"]
    length, why_length = rules.length(longest, limit, text=text)
    share, why_share = rules.held_out(report.train.rows)
    if share and not _can_hold_out(loaded, share):
        share, why_share = 0.0, "rows hang together (one text or one prompt in most of them): none can be held out"
    entries = math.ceil(report.train.tokens / length) if text else report.train.examples  # bins, or rows
    count = entries - round(entries * share)
    update, why_update = rules.rows_an_update(count)
    packed, why_packed = rules.packing(text=text)
    fit = _Fit(config, budget, packed, update)
    r, why_r = rules.rank(report.train.labelled_tokens, fit.adapt(rules.RANKS[0]) // rules.RANKS[0])
    fit.adapt(r)
    try:
        fitted = fit.find(rows, length)
    except OptionError:
        shorter, _ = rules.length(report.train.quantiles["99 %"], limit, text=text)
        if shorter >= length:
            raise
        rows, report = encoded(shorter)
        fitted = fit.find(rows, shorter)
        length, why_length = shorter, f"1 % of the rows lose their end: no plan has room for {longest:,} tokens"
    passes, why_passes = rules.epochs(count)
    steps = passes * math.ceil(count / update)
    rate, why_rate = rules.learning_rate(config.get_text_config().hidden_size, config.model_type, steps)
    warm, why_warm = rules.warm_up(steps)
    every, why_every = rules.log_every(steps)

    choices = [
        Choice("model", "name", model, ""),
        Choice("model", "max_seq_length", length, why_length),
        Choice("model", "load_in_4bit", fitted.four, fitted.why_bits),
        Choice("lora", "r", r, why_r),
        Choice("lora", "lora_alpha", rules.ALPHA, "alpha / r keeps the best learning rate where it is for every r"),
        Choice("data", "train", data, f"{report.train.rows:,} rows, format {report.train.format}"),
        Choice("data", "eval_split", share, why_share),
        Choice("train", "learning_rate", rate, why_rate),
        Choice("train", "num_train_epochs", passes, why_passes),
        Choice("train", "per_device_train_batch_size", fitted.micro, fitted.why_micro),
        Choice("train", "gradient_accumulation_steps", update // fitted.micro, why_update),
        Choice("train", "packing", packed, why_packed),
        Choice("train", "lr_scheduler_type", "linear", "down to zero: the last steps average out what is noise"),
        Choice("train", "warmup_steps", warm, why_warm),
        Choice("train", "logging_steps", every, why_every),
        *_watching(share, passes, steps),
    ]
    if fitted.four:
        choices.append(Choice("train", "optim", "adamw_8bit", "where weights are in 4 bits, memory is short"))
    if budget is not None:
        choices.append(Choice("train", "memory_budget", budget, "as asked for"))
    found = Recommendation(choices, report, fitted.plan, f"out/{_stem(loaded)}")
    found.recipe().sft_config()
    return found


def write_recipe(found: Recommendation, path: Path) -> None:
    """Write the recipe.

    Raises:
        OutputError: there is such a file, or no writing there.
    """
    check_recipe_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.as_yaml(path.parent.absolute()))


def check_recipe_path(path: Path) -> None:
    """Raise `OutputError` if a recipe cannot be written there."""
    if path.exists():
        raise OutputError("there is a file of this name already", where=str(path),
                          found="a folder" if path.is_dir() else "a file", expected="a new file",
                          fix="choose another --output, or move it away")
    check_writable(path.parent)


@dataclass(frozen=True)
class _Fitted:
    micro: int
    four: bool
    plan: RunPlan | None
    why_micro: str
    why_bits: str


class _Fit:
    """The largest micro-batch, and the most bits, that memory has room for."""

    def __init__(self, config: Any, budget: str | int | None, packed: bool, update: int) -> None:
        self.config, self.place = config, torch.device(default_device())
        self.settings: Callable[[int, int], SFTConfig] = lambda rows, length: SFTConfig(
            per_device_train_batch_size=rows, max_length=length, memory_budget=budget, packing=packed)
        self.budget, self.update, self.r = budget, update, 0

    def adapt(self, r: int) -> int:
        """Put an adapter of this rank onto the model without weights; returns how many numbers it trains."""
        if r != self.r:
            model = without_weights(self.config, self.place)
            self.refused, self.r = refusal(model), r
            self.model = FastLanguageModel.get_peft_model(model, r=r)
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def find(self, rows: Encoded, length: int) -> _Fitted:
        """The choice for rows of up to so many tokens.

        Raises:
            OptionError: there is no room for a single row.
        """
        if self.refused:
            four = self.place.type != "cpu"
            return _Fitted(min(UNPLANNED, self.update), four, None, f"there is no memory plan: {self.refused}",
                           "without a plan, the way that needs the least memory" if four else ON_CPU)
        sizes = [2**power for power in range(self.update.bit_length() - 1, -1, -1)]
        bits = [False] if self.place.type == "cpu" else [False, True]
        made: list[tuple[bool, int, RunPlan]] = []
        for four in bits:
            for micro in sizes:
                try:
                    run = self._plan(rows, length, micro, four)
                except OptionError:
                    if (four, micro) == (bits[-1], 1) and not made:
                        raise
                    continue
                if all(keep == KEEP for keep in run.plan.keeps) and not run.plan.streamed:
                    return self._said(micro, four, run, "every layer keeps what it has made")
                made.append((four, micro, run))
        four, micro, run = min(made, key=lambda item: (item[2].plan.streamed, not item[0], -item[1]))
        return self._said(micro, four, run, "layers are made again")

    def _plan(self, rows: Encoded, length: int, micro: int, four: bool) -> RunPlan:
        settings = self.settings(micro, length)
        tokens, labelled = largest_batch(rows, settings, packed=True)
        return plan_outline(self.model, Batch(tokens, labelled, min(tokens, length)), self.place,
                            optim="adamw_8bit" if four else optimizer_name(settings), precision=settings.precision,
                            budget=self.budget, checkpointing="auto", stored="nf4" if four else "dense",
                            measured=False)

    def _said(self, micro: int, four: bool, run: RunPlan, why: str) -> _Fitted:
        pieces = "an update in one piece" if micro == self.update else "the most that there is room for"
        room = f"predicted peak {gigabytes(run.plan.peak)} of {gigabytes(run.plan.budget)}"
        bits = (ON_CPU if self.place.type == "cpu" else "there is no room for 16 bits without making layers again"
                if four else "16 bits have room, and are faster")
        return _Fitted(micro, four, run, f"{pieces}, and {why}: {room}", bits)


def _can_hold_out(loaded: Loaded, share: float) -> bool:
    """Whether training could: rows of one text or one prompt are not parted."""
    try:
        hold_out(loaded, share, seed=SFTConfig().seed)
    except DataError:
        return False
    return True


def _watching(share: float, passes: int, steps: int) -> list[Choice]:
    """Evaluation and checkpoints."""
    if not share:
        return [Choice("train", "save_strategy", "epoch", "a run that is cut goes on from its last epoch"),
                Choice("train", "save_total_limit", 2, "")]
    often: list[Choice] = []
    how = "epoch"
    if passes == 1:
        how, every = "steps", max(1, steps // rules.EVALS)
        often = [Choice("train", "eval_steps", every, ""), Choice("train", "save_steps", every, "")]
    return [Choice("train", "eval_strategy", how, "the advisor compares held-out with training loss"),
            Choice("train", "save_strategy", how, "a run that is cut goes on from there"), *often,
            Choice("train", "save_total_limit", 2, ""),
            Choice("train", "load_best_model_at_end", True, "if later epochs overfit, the best one is what is saved"),
            Choice("train", "metric_for_best_model", "eval_loss", "")]


def _seen_from(folder: Path | None, value: str) -> str:
    """A local path as it is found from the recipe's folder: relative below it, else absolute."""
    if folder is None or not Path(value).exists():
        return value
    path = Path(value).absolute()
    if not path.is_relative_to(folder):
        return str(path)
    below = path.relative_to(folder)
    # A recipe's paths are looked up in the current folder first: nothing else of that name may be there.
    return str(path if below.exists() and not below.samefile(path) else below)


def _stem(loaded: Loaded) -> str:
    return Path(loaded.source).stem or "run"
