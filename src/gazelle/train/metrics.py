"""`metrics.jsonl`: one JSON object a log line, written as training goes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazelle.base.files import write_text

_TIMES = ("runtime", "_per_second", "preparation_time")


class MetricsFile(TrainerCallback):
    """Appends every log entry, with its step, to `output_dir/metrics.jsonl`; a fresh run starts a fresh file."""

    def __init__(self) -> None:
        self.begun = self.ended = False

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start the file anew, once; after a resume, keep the entries up to the step resumed from."""
        if not self.begun:
            path = metrics_path(args)
            kept = [entry for entry in read_metrics(path) if entry["step"] <= state.global_step and state.global_step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
            self.begun = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, unless an evaluation before training did."""
        if state.is_world_process_zero:
            self.begun, self.ended = self.begun and not self.ended, False  # a second run has a file of its own
            self.begin(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next run, if there is one, is another."""
        self.ended = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or logs is None:
            return
        self.begin(args, state)
        # JSON has no NaN: a loss that is not a number is written as null. Other people's callbacks log NumPy numbers.
        numbers = {name: None if isinstance(value, float | np.floating) and not math.isfinite(value) else value
                   for name, value in logs.items()}
        with metrics_path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | numbers, default=float) + "\n")


def is_eval_loss(name: str) -> bool:
    """True for the loss of an evaluation set: "eval_loss", or "eval_books_loss" where there are several."""
    return name.startswith("eval_") and name.endswith("loss")


def eval_figures(entry: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Evaluation set ("" for one without a name) → its loss, perplexity and metrics of answers, of one log entry."""
    sets = [name.removeprefix("eval_").removesuffix("loss").rstrip("_") for name in entry if is_eval_loss(name)]
    found: dict[str, dict[str, float]] = {name: {} for name in sets}
    for key, value in entry.items():
        owners = [name for name in sets if key.startswith(f"eval_{name}_" if name else "eval_")]
        if owners and not key.endswith(_TIMES) and value is not None:
            owner = max(owners, key=len)
            found[owner][key.removeprefix(f"eval_{owner}_" if owner else "eval_")] = value
    return found


def eval_history(metrics: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Evaluation set → figure → (step, value) as they were logged."""
    history: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in metrics:
        for name, figures in eval_figures(entry).items():
            for figure, value in figures.items():
                history.setdefault(name, {}).setdefault(figure, []).append((entry["step"], value))
    return history


def last_figures(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of the last evaluation; of several sets the losses alone."""
    history = eval_history(metrics)
    return [(" ".join(filter(None, ("evaluation", owner.replace("_", " "), name))), f"{values[-1][1]:.3g}")
            for owner, figures in history.items() for name, values in figures.items()
            if len(history) == 1 or name == "loss"]


def training_loss(metrics: list[dict[str, Any]], digits: int) -> str | None:
    """The first and the last loss of a run's lines, or the mean of a run too short for one; None without either."""
    losses = [entry["loss"] for entry in metrics if entry.get("loss") is not None]
    if losses:
        return f"{losses[0]:.{digits}f} → {losses[-1]:.{digits}f}"
    means = [entry["train_loss"] for entry in metrics if entry.get("train_loss") is not None]
    return f"{means[-1]:.{digits}f} on average" if means else None


def metrics_path(args: TrainingArguments) -> Path:
    """Where the metrics of a run are."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, oldest first; none if there is no file. A line cut short by a kill is left out."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line, parse_constant=lambda _: None))  # NaN of other writers is none here either
        except json.JSONDecodeError:
            break
    return entries
