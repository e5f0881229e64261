"""What is measured of answers, by name. Texts are compared in `data.text_metrics`; here they meet cases and replies."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.base.optional import require
from gazelle.data.text_metrics import METRICS as TEXT
from gazelle.data.text_metrics import bleu_tokens, contains, corpus_score, metric_name, tokens, words
from gazelle.evaluate.answerers import Reply
from gazelle.evaluate.cases import Case
from gazelle.evaluate.statistics import Estimate, mean_estimate, ratio_estimate

Kind = Literal["share", "score", "percent", "number", "seconds", "bytes"]
Surprise = tuple[float, int] | None
PerCase = Callable[[Case, Reply, Surprise], float | None]
JUDGE, MEMORY, PERPLEXITY = "judge", "peak_memory", "perplexity"


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    Attributes:
        kind: "share" of yes or no, "score" from 0 to 1, "percent" from 0 to 100, or a number with or without a unit.
        better: whether more or less of it is good; "" for neither.
        score: of one case; None where it has none. A metric without it belongs to a model as a whole, or to a judge.
        needs: what a case must have for it.
        says: what it is, in a few words.
        timed: it comes from timed replies.
    """

    name: str
    kind: Kind
    better: Literal["higher", "lower", ""]
    score: PerCase | None
    needs: tuple[Literal["expected", "keys"], ...] = ()
    says: str = ""
    timed: bool = False

    @property
    def quality(self) -> bool:
        """True if it says how right an answer is: failures are ordered by such."""
        return self.name == PERPLEXITY or (self.better == "higher" and self.kind in ("share", "score", "percent"))


def accuracy(case: Case, answer: str) -> float | None:
    """1 if the answer holds every key fact of its case; of a case without any, if it holds an accepted answer in whole
    words, both normalised (case, width, punctuation and articles do not count; each Chinese character is a word)."""
    if case.keys:
        return float(key_coverage(case, answer) == 1)
    if not case.expected:
        return None
    said = words(answer)
    return float(any(_within(words(wanted), said) if words(wanted) else wanted.strip() == answer.strip()
                     for wanted in case.expected))


def key_coverage(case: Case, answer: str) -> float | None:
    """Share of the key facts that stand in the answer, in any case, width and spacing."""
    return sum(contains(answer, key) for key in case.keys) / len(case.keys) if case.keys else None


def nearest_expected(name: str, case: Case, answer: str) -> tuple[float, str]:
    """The best score over the accepted answers by a metric of `text_metrics`, and that accepted answer."""
    return max(((TEXT[name](answer, wanted), wanted) for wanted in case.expected), key=lambda pair: pair[0])


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    return any(whole[at:at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def _text(name: str) -> PerCase:
    return lambda case, reply, _: nearest_expected(name, case, reply.text)[0] if case.expected else None


def _perplexity(_case: Case, _reply: Reply, surprise: Surprise) -> float | None:
    return float(np.exp(surprise[0] / surprise[1])) if surprise else None


def _speed(_case: Case, reply: Reply, _surprise: Surprise) -> float | None:
    return reply.tokens / reply.seconds if reply.tokens and reply.seconds else None


_BY_TEXT: tuple[tuple[str, Kind, str], ...] = (
    ("exact_match", "share", "the answer is an accepted one, to the letter"),
    ("contains", "share", "an accepted answer stands in it, inside words too"),
    ("normalised_match", "share", "the same but for case, width, punctuation and articles"),
    ("token_f1", "score", "F1 of the words shared with an accepted answer"),
    ("rouge1", "score", "F-measure of words"), ("rouge2", "score", "F-measure of pairs of words"),
    ("rougeL", "score", "F-measure of the longest common subsequence"),
    ("bleu", "percent", "BLEU of the corpus, by sacrebleu"), ("chrf", "percent", "chrF2 of the corpus, by sacrebleu"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("accuracy", "share", "higher", lambda case, reply, _: accuracy(case, reply.text), ("expected",),
           "every key fact is there; without key facts, an accepted answer in whole words"),
    *(Metric(name, kind, "higher", _text(name), ("expected",), says) for name, kind, says in _BY_TEXT),
    Metric("key_coverage", "score", "higher", lambda case, reply, _: key_coverage(case, reply.text), ("keys",),
           "share of the key facts in the answer"),
    Metric(JUDGE, "score", "higher", None, (), "grade by a judge"),
    Metric(PERPLEXITY, "number", "lower", _perplexity, ("expected",),
           "of the first accepted answer, the token that ends it included"),
    Metric("length", "number", "", lambda _, reply, __: float(len(tokens(reply.text))), (),
           "words of an answer; characters of Chinese"),
    Metric("distinct_1", "score", "", lambda _, reply, __: TEXT["distinct_1"](reply.text, ""), (),
           "share of words that are no repetition, over all answers"),
    Metric("distinct_2", "score", "", lambda _, reply, __: TEXT["distinct_2"](reply.text, ""), (),
           "share of pairs of words that are no repetition, over all answers"),
    Metric("first_token", "seconds", "lower", lambda _, reply, __: reply.first_token, (),
           "until the first piece of an answer, one at a time", timed=True),
    Metric("latency", "seconds", "lower", lambda _, reply, __: reply.seconds, (), "a whole answer, one at a time",
           timed=True),
    Metric("tokens_per_second", "number", "higher", _speed, (), "tokens of an answer by its latency", timed=True),
    Metric(MEMORY, "bytes", "lower", None, (), "weights, and most in use beyond them while answering in batches"),
)}
_SHORT = {"rouge": ("rouge1", "rouge2", "rougeL"), "distinct": ("distinct_1", "distinct_2"), "em": ("exact_match",),
          "f1": ("token_f1",), "acc": ("accuracy",), "ttft": ("first_token",), "memory": (MEMORY,),
          "throughput": ("tokens_per_second",), "answer_length": ("length",), "ppl": (PERPLEXITY,)}


def find_metrics(asked: Sequence[str | Callable[[Case, str], float | None]]) -> list[Metric]:
    """The metrics of that name, in order; a function of a case and an answer is a metric of its own name.

    Raises:
        OptionError: there is no such metric, or none is named.
        MissingDependencyError: the package that computes it is not installed.
    """
    found: dict[str, Metric] = {}
    for one in [asked] if isinstance(asked, str) else asked:
        if callable(one):
            name = getattr(one, "__name__", type(one).__name__)
            if name in METRICS or name in found:
                raise OptionError("a function has the name of another metric", where="metrics", found=name,
                                  expected="a name of its own", fix="rename the function")
            found[name] = Metric(name, "number", "higher", _function(one), (), "a function of yours")
            continue
        for name in _SHORT.get(str(one).lower()) or (_spelt(str(one)),):
            if name in TEXT:
                metric_name(name)  # its package is there
            found[name] = METRICS[name]
    if not found:
        raise OptionError("nothing to measure", where="metrics", found="no metric",
                          expected="one of " + ", ".join(METRICS), fix='for example metrics=["accuracy"]')
    return list(found.values())


def _spelt(name: str) -> str:
    plain = {other.replace("_", "").lower(): other for other in METRICS}
    found = plain.get(name.replace("_", "").replace("-", "").replace(" ", "").lower())
    if found is None:
        raise OptionError("no such metric", where="metrics", found=name, expected="one of " + ", ".join(METRICS),
                          fix=nearest(name, [*METRICS, *_SHORT]))
    return found


def _function(function: Callable[[Case, str], Any]) -> PerCase:
    def score(case: Case, reply: Reply, _surprise: Surprise) -> float | None:
        value = function(case, reply.text)
        return None if value is None else float(value)

    return score


def check_cases(metrics: Sequence[Metric], cases: Sequence[Case]) -> None:
    """Raise `DataError` if a metric finds nothing to compare with: no case has what it needs, or some lack it."""
    for metric in metrics:
        for need in metric.needs:
            lacking = [case for case in cases if not getattr(case, need)
                       and not (metric.name == "accuracy" and case.keys)]
            if len(lacking) == len(cases) or (lacking and need == "expected"):
                raise DataError(f"{metric.name} needs {need!r}, which a test case has not", where=lacking[0].where,
                                found=f"{len(lacking)} of {len(cases)} cases without {need!r}",
                                expected=f'{{"input": ..., "{need}": ...}}',
                                fix=f"add {need!r} to the cases, or leave {metric.name} out of the metrics")


def overall(metric: Metric, scores: Sequence[float | None], cases: Sequence[Case], replies: Sequence[Reply],
            surprises: Sequence[Surprise], *, confidence: float, seed: int) -> Estimate | None:
    """The figure over these cases: the mean, but for metrics of a corpus and perplexity. None if there is no score."""
    if metric.name == PERPLEXITY:
        told = [surprise for surprise in surprises if surprise]
        if not told:
            return None
        nats, counts = zip(*told, strict=True)
        value, low, high = ratio_estimate(nats, counts, confidence=confidence, seed=seed)
        return Estimate(float(np.exp(value)), None if low is None else float(np.exp(low)),
                        None if high is None else float(np.exp(high)), len(told))
    if metric.name in ("bleu", "chrf"):
        return _sacrebleu(metric.name, cases, replies, confidence)
    if metric.name.startswith("distinct_"):
        answers = [reply.text for reply in replies]
        return Estimate(corpus_score(metric.name, answers, answers), count=len(answers))
    known = [score for score in scores if score is not None]
    if not known:
        return None
    return mean_estimate(known, yes_or_no=metric.kind == "share", confidence=confidence, seed=seed)


def _sacrebleu(name: str, cases: Sequence[Case], replies: Sequence[Reply], confidence: float) -> Estimate:
    """The figure of the corpus against the nearest accepted answers, with sacrebleu's own bootstrap, of 95 %."""
    answers = [reply.text for reply in replies]
    wanted = [nearest_expected(name, case, answer)[1] for case, answer in zip(cases, answers, strict=True)]
    value = corpus_score(name, answers, wanted)
    if confidence != 0.95 or len(answers) < 2:
        return Estimate(value, count=len(answers))
    metrics: Any = require("sacrebleu").metrics
    metric = metrics.BLEU(tokenize=bleu_tokens(wanted)) if name == "bleu" else metrics.CHRF()
    found = metric.corpus_score(answers, [wanted], n_bootstrap=1000)
    said = json.loads(found.format(signature=str(metric.get_signature()), is_json=True, width=6))
    mean, half = said["confidence_mean"], said["confidence_var"]
    return Estimate(value, max(0.0, mean - half), min(100.0, mean + half), len(answers))
