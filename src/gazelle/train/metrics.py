"""`metrics.jsonl`: one JSON object a log line, written as training goes."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazelle.base.files import write_text


class MetricsFile(TrainerCallback):
    """Appends every log entry, with its step, to `output_dir/metrics.jsonl`; a fresh run starts a fresh file."""

    def __init__(self) -> None:
        self.begun = False

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
            self.begin(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or logs is None:
            return
        self.begin(args, state)
        # JSON has no NaN: a loss that is not a number is written as null. Other people's callbacks log NumPy numbers.
        numbers = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                   for name, value in logs.items()}
        with metrics_path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | numbers, default=float) + "\n")


def is_eval_loss(name: str) -> bool:
    """True for the loss of an evaluation set: "eval_loss", or "eval_books_loss" where there are several."""
    return name.startswith("eval_") and name.endswith("loss")


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
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
