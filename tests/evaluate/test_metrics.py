"""Metrics of answers by hand-computed cases, and those of a corpus against sacrebleu and rouge-score."""

import math
import sys
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from gazelle.base.errors import DataError, MissingDependencyError, OptionError
from gazelle.data.conversation import Turn
from gazelle.evaluate.answerers import Reply
from gazelle.evaluate.cases import Case
from gazelle.evaluate.metrics import METRICS, accuracy, check_cases, find_metrics, key_coverage, overall


def case(*expected: str, keys: tuple[str, ...] = ()) -> Case:
    return Case((Turn("user", "?"),), expected, keys, where="row 1")


@pytest.mark.parametrize(("answer", "expected", "right"), [
    ("The capital of France is Paris.", "Paris", 1), ("paris", "Paris", 1), ("Parisian food", "Paris", 0),
    ("法国的首都是巴黎。", "巴黎", 1), ("法国的首都是里昂。", "巴黎", 0), ("答案是Ｐａｒｉｓ！", "Paris", 1),
    ("是Paris吗", "Paris", 1), ("It is an apple.", "the apple", 1), ("It is -5.", "5", 0), ("It is 5.2.", "5", 0),
    ("It is 5.", "5", 1), ("1,000 euros", "1000 euros", 1), ("", "Paris", 0), ("Par is", "Paris", 0),
    ("42", "four two", 0), ("?!", "?!", 1), ("?", "?!", 0), ("New  York\nCity", "new york city", 1),
])
def test_accuracy_by_accepted_answers(answer: str, expected: str, right: int) -> None:
    assert accuracy(case(expected), answer) == right


def test_any_accepted_answer_will_do() -> None:
    assert accuracy(case("42", "forty-two"), "Forty-two!") == 1
    assert accuracy(case("42", "43"), "Forty-two!") == 0
    assert accuracy(case(), "anything") is None


@pytest.mark.parametrize(("answer", "keys", "right", "share"), [
    ("Ask Brida SONNICK in accounts.", ["Brida Sonnick"], 1, 1.0), ("Ask Brida.", ["Brida Sonnick"], 0, 0.0),
    ("It is teal, and 42 grams.", ["teal", "42"], 1, 1.0), ("It is teal.", ["teal", "42"], 0, 0.5),
    ("Straße", ["STRASSE"], 1, 1.0), ("第９章", ["第9章"], 1, 1.0),
])
def test_every_key_fact_must_be_there(answer: str, keys: list[str], right: int, share: float) -> None:
    asked = case("something else", keys=tuple(keys))
    assert accuracy(asked, answer) == right
    assert key_coverage(asked, answer) == share


ANSWERS = ["the cat sat on a mat today", "a dog barked loudly at night", "it rains", "the price is 42 euros for it"]
WANTED = [("the cat sat on the mat",), ("cats meow", "the dog was barking loudly at night"), ("snow falls here",),
          ("the price is 42 euros",)]


def figure(name: str, answers: list[str] = ANSWERS, wanted: Any = WANTED, **options: Any) -> Any:
    metric, = find_metrics([name])
    cases = [case(*expected) for expected in wanted]
    replies = [Reply(answer) for answer in answers]
    assert metric.score is not None
    scores = [metric.score(one, reply, None) for one, reply in zip(cases, replies, strict=True)]
    return overall(metric, scores, cases, replies, [None] * len(cases), confidence=0.95, seed=0, **options)


def test_bleu_and_chrf_of_the_corpus_are_sacrebleus() -> None:
    nearest = [wanted[-1] for wanted in WANTED]
    bleu, chrf = figure("bleu"), figure("chrf")
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [nearest]).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, [nearest]).score)
    assert 0 < bleu.low < bleu.value < bleu.high <= 100
    assert 0 < chrf.low < chrf.value < chrf.high <= 100
    chinese = figure("bleu", ["今天天气很好我们去公园", "他不在家"], [("今天天气很好我们去公园玩",), ("她不在家里",)])
    assert chinese.value == pytest.approx(sacrebleu.corpus_bleu(
        ["今天天气很好我们去公园", "他不在家"], [["今天天气很好我们去公园玩", "她不在家里"]], tokenize="zh").score)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name: str) -> None:
    scorer = RougeScorer([name])
    want = [max(scorer.score(wanted, answer)[name].fmeasure for wanted in accepted)
            for answer, accepted in zip(ANSWERS, WANTED, strict=True)]
    assert figure(name).value == pytest.approx(sum(want) / 4)


def test_what_is_measured_of_all_answers_at_once() -> None:
    assert figure("distinct_1", ["a b a", "b c", "c", ""]).value == pytest.approx(3 / 6)
    assert figure("distinct_2", ["a b a b", "a b", "", ""]).value == pytest.approx(2 / 4)
    assert figure("length", ["two words", "四个汉字", "", "one"]).value == pytest.approx((2 + 4 + 0 + 1) / 4)


def test_perplexity_weighs_every_token_once() -> None:
    metric = METRICS["perplexity"]
    surprises = [(2.0, 4), (9.0, 6)]
    cases, replies = [case("a"), case("b")], [Reply(""), Reply("")]
    assert metric.score is not None
    scores = [metric.score(one, reply, told) for one, reply, told in zip(cases, replies, surprises, strict=True)]
    assert scores == pytest.approx([math.exp(0.5), math.exp(1.5)])
    found = overall(metric, scores, cases, replies, surprises, confidence=0.95, seed=0)
    assert found is not None and found.value == pytest.approx(math.exp(11 / 10))
    assert (found.low, found.high) == pytest.approx((math.exp(0.5), math.exp(1.5)))
    assert overall(metric, [None, None], cases, replies, [None, None], confidence=0.95, seed=0) is None


def test_names_as_people_write_them() -> None:
    names = [metric.name for metric in find_metrics(["ROUGE", "chrF", "Exact Match", "ttft", "token-f1", "memory"])]
    assert names == ["rouge1", "rouge2", "rougeL", "chrf", "exact_match", "first_token", "token_f1", "peak_memory"]
    with pytest.raises(OptionError, match="no such metric") as caught:
        find_metrics(["acuracy"])
    assert caught.value.fix == "did you mean 'accuracy'?"
    with pytest.raises(OptionError, match="nothing to measure"):
        find_metrics([])


def test_a_function_is_a_metric() -> None:
    def shouts(_case: Case, answer: str) -> bool:
        return answer.isupper()

    metric, = find_metrics([shouts])
    assert metric.name == "shouts" and metric.score is not None
    assert metric.score(case(), Reply("HEY"), None) == 1.0

    def bleu(_case: Case, answer: str) -> float:
        return 1.0

    with pytest.raises(OptionError, match="name of another metric"):
        find_metrics([bleu])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependencyError, match="sacrebleu is not installed") as caught:
        find_metrics(["bleu"])
    assert caught.value.fix == "pip install gazelle[evaluate]"


def test_metrics_without_anything_to_compare_with() -> None:
    check_cases(find_metrics(["accuracy", "latency"]), [case(keys=("k",)), case("a")])
    with pytest.raises(DataError, match="key_coverage needs 'keys'"):
        check_cases(find_metrics(["key_coverage"]), [case("a")])
    with pytest.raises(DataError, match="token_f1 needs 'expected'") as caught:
        check_cases(find_metrics(["token_f1"]), [case("a"), case(keys=("k",))])
    assert "1 of 2" in caught.value.found
