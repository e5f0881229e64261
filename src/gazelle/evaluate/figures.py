"""Figures of an evaluation, drawn with matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gazelle.base.figures import COLOURS, INK, new_figure

if TYPE_CHECKING:
    from gazelle.evaluate.report import EvaluationReport
    from gazelle.evaluate.statistics import Estimate

_FULL = {"share": 1.0, "score": 1.0, "percent": 100.0}  # what a bar of full length stands for


def figures(report: "EvaluationReport") -> "list[tuple[str, Any]]":
    """(name, figure): scores of all models, the main metric by category, and times, as far as they were measured."""
    names = [result.name for result in report.results]
    found = []
    scores = [metric for metric in report.metrics if metric.quality and metric.kind in _FULL]
    if scores:
        found.append(("scores", _bars("Scores (bleu and chrf of 100)", [metric.name for metric in scores], names, [
            [(result.overall[metric.name], _FULL[metric.kind]) for metric in scores] for result in report.results])))
    main = report.main_metric
    categories = report.results[0].by_category
    if main and len(categories) > 1:
        full = _FULL.get(main.kind, 1.0)
        groups = [name or "without" for name in categories]
        found.append(("categories", _bars(f"{main.name} by category", groups, names, [
            [(result.by_category[category][main.name], full) for category in categories]
            for result in report.results], whole=main.kind in _FULL)))
    times = [metric for metric in report.metrics if metric.kind == "seconds"]
    if times and any(result.overall[metric.name] for metric in times for result in report.results):
        found.append(("times", _bars("Seconds", [metric.name for metric in times], names, [
            [(result.overall[metric.name], 1.0) for metric in times] for result in report.results], whole=False)))
    return found


def _bars(title: str, groups: Sequence[str], models: Sequence[str],
          values: "Sequence[Sequence[tuple[Estimate | None, float]]]", *, whole: bool = True) -> Any:
    """Horizontal bars with intervals, a group of models for each of `groups`; values come with what they are of."""
    figure, axes = new_figure(title, (5.6, 0.9 + len(groups) * (0.16 + 0.22 * len(models))))
    height = 0.8 / len(models)
    for at, (name, row) in enumerate(zip(models, values, strict=True)):
        known = [(group, estimate, full) for group, (estimate, full) in enumerate(row) if estimate is not None]
        places = [group + (at - (len(models) - 1) / 2) * height for group, _, _ in known]
        axes.barh(places, [estimate.value / full for _, estimate, full in known], height=height * 0.9, label=name,
                  color=COLOURS[at % len(COLOURS)])
        for place, (_, estimate, full) in zip(places, known, strict=True):
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low / full, estimate.high / full], [place, place], color=INK, linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(left=0, right=1 if whole else None)
    if whole:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside lower left", ncols=3, frameon=False)
    return figure
