"""Metrics of two strings: cases counted by hand, and the packages that define them asked directly."""

import sys

import pytest

from gazelle.base.errors import MissingDependencyError, OptionError
from gazelle.data.text_metrics import METRICS, bleu, chrf, corpus_score, distinct_n, metric_name, normalised, tokens

ANSWERS = ["The cat sat on the mat.", "Ask Brida Sonnick in accounts.", "it don't rain", "", "Nothing, at 3.5 degrees"]
EXPECTED = ["A cat was sitting on the mat.", "Brida Sonnick in the accounts team", "It doesn't rain.", "silence",
            "Nothing at 3.5 degrees!"]
CHINESE_ANSWERS = ["法国的首都是巴黎。", "今天天气很好"]
CHINESE_EXPECTED = ["首都是巴黎。", "今天的天气不错"]


@pytest.mark.parametrize(
    ("name", "answer", "expected", "score"),
    [
        ("exact_match", " Paris\n", "Paris", 1), ("exact_match", "paris", "Paris", 0),
        ("contains", "It is PARIS, of course.", "paris", 1), ("contains", "It is Lyon.", "Paris", 0),
        ("contains", "答案是ＰＡＲＩＳ", "paris", 1), ("contains", "Paris", "", 0), ("contains", " ", "", 1),
        ("normalised_match", "The U.S.", "us", 1), ("normalised_match", "巴黎。", "巴黎", 1),
        ("normalised_match", "１２ ％", "12%", 1), ("normalised_match", "C++", "C", 0),
        ("normalised_match", "3.14", "314", 0), ("normalised_match", "-5", "5", 0),
        ("normalised_match", "−5.", "-5", 1),
        ("normalised_match", "1,000", "1000", 1), ("normalised_match", "", "A", 0), ("normalised_match", "a", "A.", 1),
        ("normalised_match", "don’t", "Don't!", 1), ("normalised_match", "Paris—France", "Paris France", 1),
        ("token_f1", "the red cat", "a red dog", 1 / 2),       # red, cat against red, dog
        ("token_f1", "red red", "red", 2 / 3),                 # one shared of two and of one
        ("token_f1", "首都是巴黎", "巴黎", 4 / 7),                # 2 characters shared of 5 and of 2
        ("token_f1", "GDP增长5.2%", "GDP 增长 5.2", 1), ("token_f1", "", "x", 0), ("token_f1", "", "", 1),
        ("rouge1", "the cat", "the cat sat", 4 / 5),           # precision 1, recall 2/3
        ("rouge2", "the cat", "the cat sat", 2 / 3),           # precision 1, recall 1/2
        ("rougeL", "sat the cat", "the cat sat", 2 / 3),       # longest common: the cat
        ("rouge1", "巴黎", "在巴黎", 4 / 5), ("rougeL", "黎巴", "巴黎", 1 / 2),
        ("distinct_1", "no no yes", "", 2 / 3), ("distinct_2", "no no no", "", 1 / 2), ("distinct_2", "no", "", 0),
    ],
)
def test_by_hand(name: str, answer: str, expected: str, score: float) -> None:
    assert METRICS[name](answer, expected) == pytest.approx(score, abs=1e-12)


def test_rouge_is_the_packages_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    reference = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for answer, expected in zip(ANSWERS, EXPECTED, strict=True):
        for kind, score in reference.score(expected, answer).items():
            assert METRICS[kind](answer, expected) == score.fmeasure


def test_bleu_and_chrf_are_sacrebleus() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    for answers, expected, cut in ((ANSWERS, EXPECTED, "13a"), (CHINESE_ANSWERS, CHINESE_EXPECTED, "zh")):
        assert corpus_score("bleu", answers, expected) == BLEU(tokenize=cut).corpus_score(answers, [expected]).score
        assert corpus_score("chrf", answers, expected) == CHRF().corpus_score(answers, [expected]).score
        for answer, wanted in zip(answers, expected, strict=True):
            sentence = BLEU(tokenize=cut, effective_order=True).sentence_score(answer, [wanted]).score
            assert bleu(answer, wanted) == sentence
            assert chrf(answer, wanted) == CHRF().sentence_score(answer, [wanted]).score
    assert bleu("首都是巴黎", "首都是巴黎") == pytest.approx(100)


def test_the_figure_of_a_corpus() -> None:
    assert corpus_score("exact_match", ["a", "b", "c", "d"], ["a", "x", "x", "x"]) == 1 / 4
    assert corpus_score("distinct_1", ["no no", "no yes"], ["", ""]) == 1 / 2
    assert distinct_n([], 1) == 0


def test_words_and_characters() -> None:
    assert tokens("Café_2 东京タワー3号") == ["café", "2", "东", "京", "タ", "ワ", "ー", "3", "号"]
    assert normalised("  The “Quick”\tbrown，fox: v2.0！ ") == "quick brownfox v2.0"


@pytest.mark.parametrize(("said", "name"), [("ROUGE-L", "rougeL"), ("rouge_l", "rougeL"), ("chrF", "chrf"),
                                            ("exact match", "exact_match"), ("normalized_match", "normalised_match")])
def test_names_in_any_spelling(said: str, name: str) -> None:
    assert metric_name(said) == name


def test_unknown_names_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="did you mean 'chrf'") as caught:
        metric_name("chrff", "eval_generate")
    assert caught.value.where == "eval_generate" and all(name in caught.value.expected for name in METRICS)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependencyError, match=r"pip install gazelle\[evaluate\]"):
        metric_name("bleu")
