"""Curves of a run, drawn with matplotlib."""

from pathlib import Path
from typing import Any

from gazelle.base.figures import COLOURS, INK, new_figure, svg_of
from gazelle.train.metrics import eval_history, is_eval_loss


def curves(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """Panel title → (label, steps, values) of each of its lines; panels without any value are left out."""

    def line(label: str, key: str) -> tuple[str, list[float], list[float]]:
        entries = [entry for entry in metrics if entry.get(key) is not None]
        return label, [entry["step"] for entry in entries], [entry[key] for entry in entries]

    def label(name: str) -> str:
        return f"evaluation {name.removeprefix('eval_').removesuffix('loss').strip('_')}".rstrip()

    evaluations = sorted({name for entry in metrics for name in entry if is_eval_loss(name)})
    def graded(owner: str, name: str, values: list[tuple[int, float]]) -> tuple[str, list[float], list[float]]:
        most, label = (100, f"{name} / 100") if name in ("bleu", "chrf") else (1, name)  # one scale for all
        return f"{owner} {label}".strip(), [step for step, _ in values], [value / most for _, value in values]

    panels = {
        "Loss": [line("training", "loss"), *(line(label(name), name) for name in evaluations)],
        "Answers": [graded(owner, name, values) for owner, figures in eval_history(metrics).items()
                    for name, values in figures.items() if name not in ("loss", "perplexity")],
        "Learning rate": [line("learning rate", "learning_rate")],
        "Tokens per second": [line("tokens/s", "tokens_per_second")],
    }
    drawn = {title: [item for item in lines if item[1]] for title, lines in panels.items()}
    return {title: lines for title, lines in drawn.items() if lines}


def _figure(title: str, lines: list[tuple[str, list[float], list[float]]], size: tuple[float, float]) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(title, size)
    for number, (label, steps, values) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, values, color=colour, label=label, linewidth=1.8, marker="o" if len(steps) < 30 else None,
                  markersize=3.5)
    axes.set_xlabel("optimizer step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if title != "Learning rate":
        axes.set_ylim(bottom=0)
    if len(lines) > 1 or title in ("Loss", "Answers"):  # of which a lone line has to be told
        axes.legend(frameon=False)
    return figure


def loss_png(metrics: list[dict[str, Any]], path: Path) -> None:
    """Write the loss curve, training and evaluation, as a PNG. Writes nothing if no loss was logged."""
    lines = curves(metrics).get("Loss")
    if lines:
        _figure("Loss", lines, (8, 4.5)).savefig(path, dpi=130)


def panel_svgs(metrics: list[dict[str, Any]]) -> list[str]:
    """Each panel as a stand-alone `<svg>` element, for pasting into HTML."""
    return [svg_of(_figure(title, lines, (5.6, 3.2))) for title, lines in curves(metrics).items()]
