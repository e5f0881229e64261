"""What a benchmark found, as Markdown, CSV, JSON and a picture."""

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gazelle.base.figures import COLOURS, INK, new_figures
from gazelle.evaluate.report import table

OUT_OF_MEMORY = "out of memory"


@dataclass
class Cell:
    """What was measured with `batch_size` rows of `seq_length` tokens; None what was not, with the reason."""

    batch_size: int
    seq_length: int
    prefill_tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    inference_bytes: int | None = None
    train_tokens_per_second: float | None = None
    step_seconds: float | None = None
    train_bytes: int | None = None
    inference_error: str = ""
    train_error: str = ""


@dataclass(frozen=True)
class BenchmarkReport:
    """The outcome of `benchmark`."""

    cells: list[Cell]
    machine: dict[str, Any]
    settings: dict[str, Any]

    def to_markdown(self) -> str:
        """A table, a line for each batch size and length, and what it was measured on."""
        head = ["batch", "length", "prefill tokens/s", "first token", "decode tokens/s", "memory", "train tokens/s",
                "train memory"]
        rows = [[str(cell.batch_size), str(cell.seq_length),
                 *(_shown(value, unit, cell.inference_error) for value, unit in (
                     (cell.prefill_tokens_per_second, ""), (cell.first_token_seconds, "s"),
                     (cell.decode_tokens_per_second, ""), (cell.inference_bytes, "GiB"))),
                 *(_shown(value, unit, cell.train_error) for value, unit in (
                     (cell.train_tokens_per_second, ""), (cell.train_bytes, "GiB")))] for cell in self.cells]
        set_, machine = self.settings, self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        return (f"{table(head, rows)}\n\n{set_['model'] or 'A model'} in {set_['dtype']}, weights "
                f"{set_['weights_bytes'] / 2**30:.2f} GiB, {set_['trained_parameters']:,} parameters trained; medians "
                f"of {set_['iterations']} iterations after {set_['warmup']}, {set_['new_tokens']} tokens decoded "
                f"({machine['device']}, {machine['date']}, {versions}).\n")

    def to_csv(self) -> str:
        """The cells, a line each, with the names of `Cell`; what was not measured is empty."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [field.name for field in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in self.cells)
        return out.getvalue()

    def to_json(self) -> str:
        """Cells, settings and machine."""
        return json.dumps({"settings": self.settings, "machine": self.machine,
                           "cells": [asdict(cell) for cell in self.cells]}, indent=1, ensure_ascii=False) + "\n"

    def plot(self, path: str | Path | None = None) -> Any:
        """Tokens per second of prefill, decoding and training by length, a line for each batch size, as one figure.

        Args:
            path: a .png, .svg or .pdf to write it to.

        Returns:
            The matplotlib figure.
        """
        panels = {"Prefill": "prefill_tokens_per_second", "Decoding": "decode_tokens_per_second",
                  "Training": "train_tokens_per_second"}
        shown = {title: name for title, name in panels.items()
                 if any(getattr(cell, name) is not None for cell in self.cells)} or panels
        figure, every = new_figures([f"{title}, tokens/s" for title in shown], (4.2 * len(shown), 3.4))
        sizes = list(dict.fromkeys(cell.batch_size for cell in self.cells))
        lengths = sorted({cell.seq_length for cell in self.cells})
        for axes, name in zip(every, shown.values(), strict=True):
            for number, size in enumerate(sizes):
                points = sorted((cell.seq_length, getattr(cell, name)) for cell in self.cells
                                if cell.batch_size == size and getattr(cell, name) is not None)
                if points:
                    axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], marker="o",
                              linewidth=1.8, label=f"batch {size}")
            axes.set_xlabel("length in tokens", color=INK)
            axes.set_xticks(lengths)
            axes.set_ylim(0, 1.1 * max((getattr(cell, name) or 0 for cell in self.cells), default=0) or 1)
        handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(),
                                                                                  strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles),
                          frameon=False)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure


def _shown(value: float | None, unit: str, error: str) -> str:
    if value is None:
        return error or "–"
    if unit == "GiB":
        return f"{value / 2**30:.2f} GiB"
    if unit:
        return f"{value:.3f} {unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
