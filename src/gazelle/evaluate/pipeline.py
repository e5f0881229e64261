"""`EvaluationPipeline`: models, test cases and metrics in, a report out."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.base.machine import machine_facts
from gazelle.evaluate.answerers import Answerer, LocalModel, Reply
from gazelle.evaluate.cases import Case, by_category, read_cases
from gazelle.evaluate.endpoint import Endpoint
from gazelle.evaluate.judge import JudgeFunction, judge_with
from gazelle.evaluate.metrics import JUDGE, MEMORY, PERPLEXITY, Metric, Surprise, check_cases, find_metrics, overall
from gazelle.evaluate.report import Comparison, EvaluationReport, Result
from gazelle.evaluate.statistics import Estimate, compare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase



class EvaluationPipeline:
    """Asks models the same questions and measures their answers.

    Args:
        model: a Hugging Face causal model, with or without an adapter; a folder, hub name or GGUF file; the address of
            an OpenAI-compatible server with a model's name, such as http://127.0.0.1:8000/v1#name; or an `Answerer`.
        tokenizer: of a model in memory.
        test_cases: a list of `{"input": ..., "expected": ...}`, or a file or anything else that `read_cases` takes.
        metrics: names from `gazelle.evaluate.metrics.METRICS`, and functions of a `Case` and an answer that give a
            number or None. "rouge", "distinct" and "latency" are taken for what they commonly mean.
        models: name → model, as `model` or a pair of model and tokenizer, to compare side by side. The first of all,
            `model` if that is given, is the one that others are compared with.
        judge: for the metric "judge": a model, as above, or a function of a case and an answer with grades of 0 to 1.
        max_new_tokens: the longest answer.
        batch_size: cases that a model in memory answers at a time.
        timed_cases: how many cases, spread over all, are answered one at a time for first_token, latency and
            tokens_per_second.
        confidence: of all intervals.
        seed: of bootstraps and permutations.

    Raises:
        UserError: before any model is asked: an unknown metric, a package it lacks, a case that is none or that lacks
            what a metric compares with.
    """

    def __init__(
        self, model: Any = None, tokenizer: "PreTrainedTokenizerBase | None" = None, test_cases: Any = None,
        metrics: Sequence[str | Callable[[Case, str], float | None]] = ("accuracy",), *,
        models: Mapping[str, Any] | None = None, judge: Any = None, max_new_tokens: int = 256, batch_size: int = 16,
        timed_cases: int = 20, confidence: float = 0.95, seed: int = 0,
    ) -> None:
        for name, value, fits, expected in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("timed_cases", timed_cases, timed_cases >= 1, "at least 1"),
            ("confidence", confidence, 0 < confidence < 1, "between 0 and 1"),
            ("test_cases", test_cases, test_cases is not None, "a list of cases, or a file with them"),
        ):
            if not fits:
                raise OptionError("a value that cannot be used", where=name, found=value, expected=expected,
                                  fix=f"change {name}")
        self._source = test_cases if isinstance(test_cases, str) else getattr(test_cases, "name", "")
        self.cases = read_cases(test_cases)
        self.metrics = find_metrics(metrics)
        if judge is not None and JUDGE not in [metric.name for metric in self.metrics]:
            self.metrics += find_metrics([JUDGE])
        check_cases(self.metrics, self.cases)
        given = ({"model": model} if model is not None else {}) | dict(models or {})
        if not given:
            raise OptionError("there is no model to evaluate", where="model", found="none",
                              expected="a model, or models={name: model, ...}", fix="pass a model and its tokenizer")
        self.answerers = {name: answerer_of(one, tokenizer, batch_size) for name, one in given.items()}
        self.judge: Answerer | JudgeFunction | None = (
            judge if judge is None or _is_function(judge) else answerer_of(judge, tokenizer, batch_size))
        if self.judge is None and any(metric.name == JUDGE for metric in self.metrics):
            raise OptionError("the metric 'judge' has no judge", where="judge", found="none",
                              expected="a model or a function of a case and an answer", fix="pass judge=")
        self._max_new_tokens, self._timed_cases = max_new_tokens, timed_cases
        self._confidence, self._seed = confidence, seed

    def run(self) -> EvaluationReport:
        """Ask every model, one after the other, then measure. Models that were given as folders are loaded meanwhile
        and let go of again.

        Raises:
            UserError: before any model is asked, if one of them, or the judge, is not there.
        """
        judges = [self.judge] if isinstance(self.judge, Answerer) else []
        for answerer in (*self.answerers.values(), *judges):
            answerer.check()
        asked = {name: self._ask(name, answerer) for name, answerer in self.answerers.items()}
        grades = self._grade({name: replies for name, (replies, _, _) in asked.items()})
        groups = by_category(self.cases)
        groups = groups if set(groups) != {""} else {}
        results = [self._result(name, *asked[name], grades.get(name, []), groups) for name in asked]
        return EvaluationReport(
            self.cases, self.metrics, results, self._comparisons(results), machine_facts(),
            {"test_cases": self._source, "max_new_tokens": self._max_new_tokens, "confidence": self._confidence,
             "timed_cases": self._timed_cases, "decoding": "greedy"})

    def _ask(self, name: str, answerer: Answerer) -> tuple[list[Reply], list[Surprise], float]:
        """Replies, how surprising each expected answer is, and the seconds that all replies took."""
        timed = _spread(len(self.cases), self._timed_cases) if any(metric.timed for metric in self.metrics) else ()
        logger.info("asking %s %d question%s …", name, len(self.cases), "s" * (len(self.cases) != 1))
        answerer.open()
        try:
            began = time.perf_counter()
            replies = answerer.ask(self.cases, self._max_new_tokens, timed)
            seconds = time.perf_counter() - began
            surprises: Sequence[Surprise] | None = None
            if any(metric.name == PERPLEXITY for metric in self.metrics):
                surprises = answerer.surprise(self.cases)
        finally:
            answerer.close()
        return replies, list(surprises or [None] * len(self.cases)), seconds

    def _grade(self, asked: Mapping[str, Sequence[Reply]]) -> dict[str, list[float | None]]:
        if self.judge is None:
            return {}
        logger.info("judging %d answers …", len(self.cases) * len(asked))
        pairs = [(case, reply.text) for replies in asked.values()
                 for case, reply in zip(self.cases, replies, strict=True)]
        grades, count = judge_with(self.judge, pairs), len(self.cases)
        return {name: grades[at * count:(at + 1) * count] for at, name in enumerate(asked)}

    def _result(self, name: str, replies: list[Reply], surprises: list[Surprise], seconds: float,
                grades: list[float | None], groups: Mapping[str, Sequence[int]]) -> Result:
        answerer = self.answerers[name]
        scores: dict[str, list[float | None]] = {}
        for metric in self.metrics:
            if metric.name == JUDGE:
                scores[JUDGE] = grades
            elif metric.score is not None:
                scores[metric.name] = [metric.score(case, reply, surprise) for case, reply, surprise
                                       in zip(self.cases, replies, surprises, strict=True)]

        def estimate(metric: Metric, chosen: Sequence[int]) -> Estimate | None:
            if metric.name == MEMORY:
                return None if answerer.memory is None else Estimate(answerer.memory)
            return overall(metric, [scores[metric.name][number] for number in chosen],
                           [self.cases[number] for number in chosen], [replies[number] for number in chosen],
                           [surprises[number] for number in chosen], confidence=self._confidence, seed=self._seed)

        everything = range(len(self.cases))
        return Result(name, answerer.runs_on, seconds, replies, scores,
                      {metric.name: estimate(metric, everything) for metric in self.metrics},
                      {category: {metric.name: estimate(metric, chosen) for metric in self.metrics
                                  if metric.name != MEMORY} for category, chosen in groups.items()})

    def _comparisons(self, results: Sequence[Result]) -> list[Comparison]:
        """Each model beside the first, by every metric that has a score for each case and a better side."""
        first, *others = results
        found = []
        for other in others:
            for metric in self.metrics:
                pairs = [(a, b) for a, b in zip(first.scores.get(metric.name, ()), other.scores.get(metric.name, ()),
                                                strict=False) if a is not None and b is not None]
                if metric.better and pairs:
                    found.append(Comparison(metric.name, first.name, other.name, compare(
                        *zip(*pairs, strict=True), yes_or_no=metric.kind == "share", confidence=self._confidence,
                        seed=self._seed)))
        return found


def answerer_of(model: Any, tokenizer: "PreTrainedTokenizerBase | None" = None, batch_size: int = 16) -> Answerer:
    """What asks `model`, in any of the forms that `EvaluationPipeline` takes one."""
    if isinstance(model, Answerer):
        return model
    if isinstance(model, tuple | list) and len(model) == 2:
        return answerer_of(model[0], model[1], batch_size)
    if isinstance(model, str) and model.startswith(("http://", "https://")):
        return Endpoint(model)
    return LocalModel(model, tokenizer, batch_size=batch_size)


def _is_function(judge: Any) -> bool:
    """A model can be called, too."""
    return callable(judge) and not hasattr(judge, "generate")


def _spread(count: int, most: int) -> list[int]:
    """Numbers of `most` cases, or of all, evenly over `count`."""
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]
