"""What is seen while training runs: the data report, then one live line in a terminal or plain lines elsewhere."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazelle.data.report import DataReport
from gazelle.train.metrics import eval_figures


class Progress(TrainerCallback):
    """Prints to standard error, on the first process only.

    Args:
        report: the data report, shown before the first step.
        console: where to print; default: standard error.
    """

    def __init__(self, report: DataReport, console: Console | None = None) -> None:
        self.report = report
        self.console = console or Console(stderr=True)
        self.bar: Bar | None = None
        self.task = TaskID(0)
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the data report and start the line."""
        if not state.is_world_process_zero:
            return
        self.started, self.first_step = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            self.console.print(self.report.table())
            for warning in self.report.warnings:
                # Warnings quote tokens such as [/INST], which are not to be taken for markup.
                self.console.print(f"! {warning}", style="yellow", markup=False, highlight=False)
            self.bar = Bar(TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
                           TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[figures]}"),
                           TimeElapsedColumn(), console=self.console)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self.bar.start()
        else:
            for line in self.report.lines():
                self.say(line)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        """Show the figures of a log entry."""
        if not state.is_world_process_zero or not logs:
            return
        for name, found in eval_figures(logs).items():
            which = f"{name.replace('_', ' ')} " if name else ""
            others = "".join(f" · {figure} {value:.4g}" for figure, value in found.items() if figure != "loss")
            self.say(f"step {state.global_step}/{state.max_steps} · evaluation {which}loss "
                     f"{found.get('loss', math.nan):.4f}{others}")
        if "loss" not in logs:
            return
        figures = (f"loss {logs['loss']:.4f} · lr {logs['learning_rate']:.2e} · {logs['tokens_per_second']:,.0f} tok/s"
                   f" · {logs['memory_gb']:.1f} GB · {self.time_left(state)} left")
        if self.bar:
            self.bar.update(self.task, figures=figures)
        else:
            self.say(f"step {state.global_step}/{state.max_steps} · {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state of the line on the screen."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def say(self, line: str) -> None:
        """One plain line, never wrapped or coloured by guesswork."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def time_left(self, state: TrainerState) -> str:
        """Remaining time at the mean pace so far, as h:mm:ss."""
        done = state.global_step - self.first_step
        seconds = round((time.perf_counter() - self.started) / max(done, 1) * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
