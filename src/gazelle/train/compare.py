"""Several runs side by side, from the folders that they left."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from gazelle.base.errors import OptionError
from gazelle.base.figures import COLOURS, INK, new_figures, svg_of
from gazelle.base.files import write_text
from gazelle.data.text_metrics import METRICS
from gazelle.models.record import RECORD, read_record
from gazelle.train.checkpoint import checkpoints
from gazelle.train.metrics import eval_history, is_eval_loss, read_metrics

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>gazelle compare</title><style>
body { margin: 2rem auto; max-width: 1160px; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #1e293b; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top;
border-bottom: 1px solid #e2e8f0; } th { color: #64748b; font-weight: 600; } svg { width: 100%; height: auto; }
</style></head><body><h1>{{ names | length }} runs</h1><table><tr><th></th>{% for name in names %}<th>{{ name }}</th>
{%- endfor %}</tr>{% for what, values in rows %}<tr><th>{{ what }}</th>{% for value in values %}<td>{{ value }}</td>
{%- endfor %}</tr>{% endfor %}</table>{{ plot | safe }}</body></html>
"""


@dataclass(frozen=True)
class Run:
    """One run: a name to call it by, its metrics, its settings, and figures by what they are."""

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    settings: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; names are as short as tells them apart.

    Raises:
        OptionError: a folder holds no run, or is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise OptionError("a run is named twice", where=str(folder), found=str(place), expected="different runs",
                              fix="name each folder once")
    return [_read(folder, name) for folder, name in zip(folders, _names(places), strict=True)]


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, one value a run): figures that some run has, then the settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    rows = [(name, [_shown(run.figures.get(name)) for run in runs]) for name in names]
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((name, [_shown(value) for value in values]))
    return rows


def as_json(runs: Sequence[Run]) -> str:
    """Figures and settings of all runs."""
    return json.dumps([{"name": run.name, "folder": str(run.folder), "figures": run.figures, "settings": run.settings}
                       for run in runs], indent=1, default=str, ensure_ascii=False)


def draw(runs: Sequence[Run]) -> Any:
    """Loss, evaluation loss and learning rate of all runs, one colour a run, as a matplotlib figure."""
    from matplotlib.ticker import MaxNLocator

    panels = (("Training loss", lambda name: name == "loss"), ("Evaluation loss", is_eval_loss),
              ("Learning rate", lambda name: name == "learning_rate"))
    figure, every = new_figures([title for title, _ in panels], (15, 4.6))
    handles: dict[str, Any] = {}
    for axes, (_, wanted) in zip(every, panels, strict=True):
        for number, run in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            for name in sorted({name for entry in run.metrics for name in entry if wanted(name)}):
                points = [(entry["step"], entry[name]) for entry in run.metrics if entry.get(name) is not None]
                line, = axes.plot(*zip(*points, strict=True), dashes, color=colour, linewidth=1.8,
                                  marker="o" if len(points) < 30 else None, markersize=3.5) if points else (None,)
                if line is not None:
                    handles.setdefault(run.name, line)
        axes.set_xlabel("optimizer step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if not axes.lines:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=INK)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
                      ncols=min(len(handles), 4))
    return figure


def write_page(runs: Sequence[Run], path: Path) -> None:
    """The table and the curves as one HTML file without outside parts."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    write_text(path, page.render(names=[run.name for run in runs], rows=table(runs), plot=svg_of(draw(runs))))


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir() or not (folder / "metrics.jsonl").is_file():
        raise OptionError("this is no run", where=str(folder), found="no metrics.jsonl" if folder.is_dir() else
                          "no such folder", expected="a folder that training wrote", fix="name the run's output_dir")
    metrics = _metrics(folder / "metrics.jsonl")
    record = read_record(folder).get("run") or {}
    pairs = {key: record.get(key) or [] for key in ("settings", "facts")}
    if not (all(isinstance(them, list) and all(isinstance(pair, list) and [*map(type, pair)] == [str, str]
                                               for pair in them) for them in pairs.values())
            and all(isinstance(record.get(key), str | None) for key in ("train", "eval"))):
        raise OptionError("what a run was cannot be read", where=str(folder / RECORD), found="other values in run",
                          expected="what training wrote", fix="delete the file, or leave this run out")
    settings = dict(pairs["settings"])
    settings |= {key: value for key, value in _recipe(folder).items() if key.rpartition(".")[2] not in settings}
    data = {what: Path(record[key]).name for what, key in (("data", "train"), ("evaluation data", "eval"))
            if record.get(key)}
    return Run(name, folder, metrics, settings, _figures(folder, metrics, dict(pairs["facts"])) | data)


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        metrics = read_metrics(path)
    except UnicodeDecodeError as error:
        raise OptionError("the metrics of a run cannot be read", where=str(path), found=str(error), expected="UTF-8",
                          fix="leave this run out") from error
    for entry in metrics:
        numbers = isinstance(entry, dict) and all(value is None or isinstance(value, int | float)
                                                  for name, value in entry.items() if _is_drawn(name))
        if not numbers or not isinstance(entry.get("step"), int):
            raise OptionError("the metrics of a run cannot be read", where=str(path),
                              found=f"a line that is no log entry: {str(entry)[:60]}",
                              expected="one JSON object with a step and numbers a line", fix="leave this run out")
    return metrics


def _is_drawn(name: str) -> bool:
    """Whether what has this name in a log entry is reckoned with; a script's own figures may be lists."""
    return name in ("loss", "learning_rate", "tokens_per_second", "peak_memory_gb", "train_runtime") or (
        name.startswith("eval_") and name.endswith(("loss", "perplexity")))


def _figures(folder: Path, metrics: list[dict[str, Any]], facts: dict[str, str]) -> dict[str, Any]:
    steps = max((entry["step"] for entry in metrics), default=0)
    ended = any("train_runtime" in entry for entry in metrics)
    found: dict[str, Any] = {"steps": steps if ended else f"{steps} (not ended)"}
    if not ended and (last := checkpoints(folder)[:1]):
        found["last checkpoint"] = last[0].name
    losses = [entry["loss"] for entry in metrics if entry.get("loss") is not None]
    if losses:
        found |= {"training loss": losses[-1], "least training loss": min(losses)}
    for owner, figures in eval_history(metrics).items():
        for name, values in figures.items():
            what = " ".join(filter(None, ("evaluation", owner, name)))
            found[what] = values[-1][1]
            if name in METRICS or name in ("loss", "perplexity"):  # of a script's own nobody knows what is better
                best = (max if name in METRICS else min)(value for _, value in values)
                found[f"best {what}"] = best
    speeds = [entry["tokens_per_second"] for entry in metrics if entry.get("tokens_per_second") is not None]
    if speeds:
        found["tokens per second"] = sum(speeds) / len(speeds)
    if peaks := [entry["peak_memory_gb"] for entry in metrics if entry.get("peak_memory_gb") is not None]:
        found["peak memory, GB"] = max(peaks)
    for entry in metrics:
        if entry.get("train_runtime") is not None:
            found["training time, s"] = entry["train_runtime"]
    if "parameters trained" in facts:
        found["parameters trained"] = facts["parameters trained"]
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe that a run was made by, flat; nothing where a script made it, or where it cannot be read."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError("the recipe of a run cannot be read", where=str(path), found=str(error).splitlines()[0],
                          expected="YAML", fix="mend the file or delete it") from error
    return {name: value for name, value in _flat(content) if name != "output_dir"}


def _flat(content: Any, before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _names(places: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
