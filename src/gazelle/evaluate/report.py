"""What an evaluation found, as JSON, Markdown, HTML and pictures."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gazelle.base.errors import shorten
from gazelle.base.figures import svg_of
from gazelle.base.files import check_writable, disk_errors, write_text
from gazelle.base.machine import fact_rows
from gazelle.base.pages import page_template
from gazelle.evaluate.answerers import Reply
from gazelle.evaluate.cases import Case
from gazelle.evaluate.metrics import Metric
from gazelle.evaluate.statistics import Difference, Estimate

SHOWN_FAILURES = 20  # of a model in Markdown; HTML has ten times as many, JSON has all answers
Scores = dict[str, Estimate | None]


@dataclass(frozen=True)
class Result:
    """One model: its replies and their scores, a list as long as the cases for each metric that has one a case, and
    the figures over all cases and by category. `seconds` is how long all replies took."""

    name: str
    runs_on: str
    seconds: float
    replies: list[Reply]
    scores: dict[str, list[float | None]]
    overall: Scores
    by_category: dict[str, Scores]


@dataclass(frozen=True)
class Comparison:
    """A model beside the first one, by one metric."""

    metric: str
    first: str
    second: str
    difference: Difference


@dataclass(frozen=True)
class EvaluationReport:
    """The outcome of `EvaluationPipeline.run`."""

    cases: list[Case]
    metrics: list[Metric]
    results: list[Result]
    comparisons: list[Comparison]
    machine: dict[str, Any]
    settings: dict[str, Any]

    @property
    def main_metric(self) -> Metric | None:
        """The first metric that says how right an answer is: failures are those that it does not give full marks."""
        return next((metric for metric in self.metrics if metric.quality), None)

    def result(self, name: str) -> Result:
        """The result of a model."""
        return next(result for result in self.results if result.name == name)

    def failures(self, name: str) -> list[int]:
        """Numbers of the cases a model failed, worst first: by the main metric, then by the mean of the others that say
        how right an answer is."""
        main = self.main_metric
        if main is None:
            return []
        scores = self.result(name).scores
        others = [metric for metric in self.metrics if metric.quality and metric is not main]

        def goodness(metric: Metric, number: int) -> float:
            score = scores[metric.name][number]
            if score is None:
                return 0.0
            return 1 / score if metric.better == "lower" else score / (100 if metric.kind == "percent" else 1)

        def order(number: int) -> tuple[float, float]:
            return goodness(main, number), sum(goodness(metric, number) for metric in others)

        # Less than full marks; one that is unsure of the next token is no failure by that alone.
        least = 1 - 1e-9 if main.better == "higher" else float("inf")
        return sorted((number for number in range(len(self.cases)) if goodness(main, number) < least), key=order)

    def to_json(self) -> str:
        """Everything: settings, figures, comparisons, and each case with every model's answer and scores."""
        return json.dumps({
            "settings": self.settings, "machine": self.machine,
            "metrics": [{"name": metric.name, "kind": metric.kind, "better": metric.better, "says": metric.says}
                        for metric in self.metrics],
            "models": {result.name: {
                "runs_on": result.runs_on, "seconds": round(result.seconds, 2), "overall": _plain(result.overall),
                "by_category": {category: _plain(scores) for category, scores in result.by_category.items()},
                "failures": self.failures(result.name),
            } for result in self.results},
            "comparisons": [{"metric": one.metric, "first": one.first, "second": one.second, **asdict(one.difference)}
                            for one in self.comparisons],
            "cases": [{
                "messages": case.messages, "expected": case.expected, "keys": case.keys, "category": case.category,
                "where": case.where, "answers": {result.name: result.replies[number].text for result in self.results},
                "scores": {result.name: {name: scores[number] for name, scores in result.scores.items()}
                           for result in self.results},
            } for number, case in enumerate(self.cases)],
        }, indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Tables for people: figures, comparisons, categories, and the worst failures of each model."""
        names = [result.name for result in self.results]
        parts = ["# Evaluation", self.summary(),
                 table(["", *names], [[f"{metric.name}{_ARROWS[metric.better]}",
                                       *(shown(metric, result.overall[metric.name]) for result in self.results)]
                                      for metric in self.metrics])]
        if self.comparisons:
            parts += [f"## Beside {names[0]}", table(["metric", "model", "difference", "better", "worse", "p", "test"],
                                                     self.comparison_rows())]
        main = self.main_metric
        if main and self.results[0].by_category:
            parts += [f"## {main.name} by category", table(["", *names], self.category_rows(main))]
        for result in self.results:
            rows = self.failure_rows(result, SHOWN_FAILURES)
            if main and rows:
                parts += [f"## Failures of {result.name}, worst first",
                          table(["question", "expected", "answer", main.name], rows)]
        return "\n\n".join([*parts, *self.notes()]) + "\n"

    def to_html(self) -> str:
        """One page without outside parts: what Markdown has, with figures and more failures."""
        from gazelle.evaluate.figures import figures

        main = self.main_metric
        facts = [("questions", str(len(self.cases))), *((f"{main.name}, {result.name}", shown(
            main, result.overall[main.name], interval=False)) for result in self.results if main)]
        return str(page_template(Path(__file__).parent / "evaluation.html.jinja").render(
            title="Evaluation of " + ", ".join(result.name for result in self.results), subtitle=self.summary(),
            cards=facts, plots=[svg_of(figure) for _, figure in figures(self)], report=self, main=main, shown=shown,
            arrows=_ARROWS, comparison_rows=self.comparison_rows(), notes=self.notes(),
            categories=self.category_rows(main) if main and self.results[0].by_category else [],
            failures=[(result, self.failures(result.name), self.failure_rows(result, 10 * SHOWN_FAILURES, whole=True))
                      for result in self.results],
            settings=[*self.settings.items(), *((f"{result.name} runs on", result.runs_on) for result in self.results)],
            machine=fact_rows(self.machine),
        ))

    def plot(self, folder: str | Path) -> list[Path]:
        """Write the figures as PNG files into an existing folder; returns their paths."""
        from gazelle.evaluate.figures import figures

        paths = []
        for name, figure in figures(self):
            paths.append(Path(folder) / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
        return paths

    def save(self, folder: str | Path) -> Path:
        """Write evaluation.json, .md, .html and the figures into a folder; other files in it, such as votes, stay.

        Raises:
            OutputError: the place cannot be written to.
        """
        target = Path(folder)
        check_writable(target)
        texts = {"json": self.to_json(), "md": self.to_markdown(), "html": self.to_html()}
        target.mkdir(parents=True, exist_ok=True)
        with disk_errors(target):
            for suffix, text in texts.items():
                write_text(target / f"evaluation.{suffix}", text)
            self.plot(target)
        return target

    def summary(self) -> str:
        """What was asked, when and where, in a line."""
        count, source = len(self.cases), self.settings.get("test_cases")
        return (f"{count} question{'s' * (count != 1)}{f' of {source}' if source else ''}, greedy answers of up to "
                f"{self.settings['max_new_tokens']} tokens · {self.machine['date']} · {self.machine['device']}")

    def comparison_rows(self) -> list[list[str]]:
        """Cells: metric, model, difference with interval, cases better and worse, p, test."""
        rows = []
        for one in self.comparisons:
            metric = next(metric for metric in self.metrics if metric.name == one.metric)
            found = one.difference
            better, worse = (found.better, found.worse)[::1 if metric.better == "higher" else -1]
            rows.append([one.metric, one.second, shown(metric, Estimate(found.value, found.low, found.high), sign=True),
                         str(better), str(worse), f"{found.p:.2g}" if found.p >= 1e-4 else "< 0.0001", found.test])
        return rows

    def category_rows(self, metric: Metric) -> list[list[str]]:
        """Cells: category, its cases, and each model's figure."""
        return [[f"{category or 'without'} ({sum(case.category == category for case in self.cases)})",
                 *(shown(metric, result.by_category[category].get(metric.name)) for result in self.results)]
                for category in self.results[0].by_category]

    def failure_rows(self, result: Result, most: int, *, whole: bool = False) -> list[list[str]]:
        """Cells of the worst failures: question, expected, answer, score by the main metric."""
        main = self.main_metric
        rows = []
        for number in self.failures(result.name)[:most]:
            case = self.cases[number]
            cells = [case.question, " / ".join(case.expected or case.keys),
                     result.replies[number].text.strip() or "(nothing)"]
            score = result.scores[main.name][number] if main else None
            rows.append([*(cell if whole else shorten(cell) for cell in cells),
                         "–" if score is None or main is None else shown(main, Estimate(score))])
        return rows

    def notes(self) -> list[str]:
        """How figures and tests were made."""
        share = f"{self.settings['confidence']:.0%}"
        notes = [f"- {metric.name}: {metric.says}" for metric in self.metrics]
        notes.append(f"- In brackets: {share} intervals, Wilson's for shares, by bootstrap over the cases else.")
        if any(metric.timed for metric in self.metrics):
            notes.append(f"- Times: {min(self.settings['timed_cases'], len(self.cases))} cases, one at a time.")
        if self.comparisons:
            notes.append("- Differences are means over the cases, of bleu, chrf and perplexity of what each case "
                         f"scores by itself. p is not corrected for the {len(self.comparisons)} comparisons made.")
        return ["\n".join(notes)]


_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def shown(metric: Metric, estimate: Estimate | None, *, interval: bool = True, sign: bool = False) -> str:
    """A figure with its unit and interval, such as "94% [86%, 98%]"; "–" where there is none."""
    if estimate is None:
        return "–"

    def one(value: float) -> str:
        plus = "+" if sign else ""
        match metric.kind:
            case "share":
                return f"{value * 100:{plus}.0f}{' points' if sign else '%'}"
            case "score":
                return f"{value:{plus}.2f}"
            case "seconds":
                return f"{value:{plus}.3f} s" if abs(value) < 1 else f"{value:{plus}.2f} s"
            case "bytes":
                return f"{value / 1e9:{plus}.2f} GB"
            case _:
                return f"{value:{plus},.1f}" if abs(value) < 1e5 else f"{value:{plus}.3g}"

    text = one(estimate.value)
    if interval and estimate.low is not None and estimate.high is not None:
        text += f" [{one(estimate.low)}, {one(estimate.high)}]"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell, or begin HTML, is escaped, and what would steer a terminal left out."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    for char, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`")):
        text = text.replace(char, safe)
    return "".join(char for char in " ".join(text.split()) if unicodedata.category(char) != "Cc")


def _plain(scores: Scores) -> dict[str, Any]:
    return {name: None if estimate is None else asdict(estimate) for name, estimate in scores.items()}
