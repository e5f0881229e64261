"""`report.html`: what a run was given, what it did and what came of it, in one file without outside parts."""

import datetime
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from gazelle.base.files import write_text
from gazelle.base.machine import fact_rows, machine_facts
from gazelle.base.pages import page_template
from gazelle.data.report import DataReport
from gazelle.train.config import SECRETS
from gazelle.train.facts import RunFacts
from gazelle.train.metrics import last_figures, metrics_path, read_metrics, training_loss
from gazelle.train.plot import loss_png, panel_svgs
from gazelle.train.samples import Sample


def write_report(args: TrainingArguments, facts: RunFacts, data: DataReport, samples: list[Sample]) -> Path:
    """Write `report.html` and `loss.png` into the output folder; returns the path of the page."""
    folder = Path(str(args.output_dir))
    metrics = read_metrics(metrics_path(args))
    loss_png(metrics, folder / "loss.png")
    losses = training_loss(metrics, 2)
    cards = [("optimizer steps", f"{facts.steps:,}"), ("training time", duration(facts.seconds)),
             ("tokens per second", f"{facts.tokens_per_second:,.0f}"),
             ("peak memory", f"{facts.peak_memory / 1e9:.1f} GB"),
             ("parameters trained", f"{facts.trainable / 1e6:,.1f} M ({facts.trainable / facts.parameters:.1%})")]
    if losses:
        cards.insert(0, ("training loss", losses))
    cards[bool(losses):bool(losses)] = last_figures(metrics)
    page = page_template(Path(__file__).parent / "report.html.jinja").render(
        title=f"Fine-tuning {Path(facts.model_name).name or facts.model_name}",
        subtitle=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z} · {folder}",
        cards=cards, plots=panel_svgs(metrics), samples=samples,
        advice=facts.advice, stopped=facts.stopped, plan=facts.plan, warnings=data.warnings,
        data_lines="\n".join(data.lines(warnings=False)),
        settings=chosen_settings(args, facts), all_settings=_all_settings(args), machine=fact_rows(machine_facts()),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def duration(seconds: float) -> str:
    """Seconds as "45 s", "3 min 20 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def chosen_settings(args: TrainingArguments, facts: RunFacts) -> list[tuple[str, Any]]:
    """The few settings that readers look for first."""
    names = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
             "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "seed",
             "max_length", "packing", "train_on")
    chosen = [(name, _plain(getattr(args, name))) for name in names if hasattr(args, name)]
    adapter = ", ".join(f"{name}={_plain(value)}" for name, value in (facts.adapter or {}).items())
    return [("model", facts.model_name), ("adapter", adapter or "none: full fine-tuning"), *chosen]


def _all_settings(args: TrainingArguments) -> list[tuple[str, Any]]:
    return [(option.name, "(set)" if option.name in SECRETS and getattr(args, option.name) else
             _plain(getattr(args, option.name)))
            for option in sorted(fields(args), key=lambda item: item.name) if not option.name.startswith("_")]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(sorted(map(str, value)))
    return getattr(value, "value", value)  # enums by their value
