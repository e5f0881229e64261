"""How near an answer is to the expected one: functions of two strings, by the names that options use.

Each takes (answer, expected) and gives 0 to 1, but `bleu` and `chrf` 0 to 100, as sacrebleu does. Chinese and Japanese
are cut into characters wherever other languages are cut into words. `corpus_score` is the figure of many answers.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gazelle.base.errors import OptionError, nearest
from gazelle.base.optional import require

TextMetric = Callable[[str, str], float]

# Scripts without spaces between words: Han and kana.
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKENS = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_HAN_OR_REST = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ALIKE = str.maketrans({"’": "'", "‘": "'", "−": "-"})
# What makes another number when it is left out: a decimal point, and a minus that is no hyphen.
_OF_NUMBERS = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\.?\d)")


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same but for white space around them."""
    return float(answer.strip() == expected.strip())


def contains(answer: str, expected: str) -> float:
    """1 if the expected text stands somewhere in the answer, in any case, width and spacing; inside words too."""
    wanted, said = _folded(expected), _folded(answer)
    return float(wanted in said if wanted else not said)


def normalised_match(answer: str, expected: str) -> float:
    """1 if both are the same once `normalised`."""
    return float(normalised(answer) == normalised(expected))


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words that both share, however ordered, once `normalised`: SQuAD's (Rajpurkar et al., 2016)."""
    said, wanted = (Counter(words(text)) for text in (answer, expected))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def rouge(kind: str) -> TextMetric:
    """F-measure of ROUGE (Lin, 2004) by the rouge-score package, without stemming.

    Args:
        kind: rouge1, rouge2 or rougeL.
    """

    def score(answer: str, expected: str) -> float:
        return float(_rouge_scorer(kind).score(expected, answer)[kind].fmeasure)

    score.__name__ = kind
    return score


def bleu(answer: str, expected: str) -> float:
    """Sentence BLEU by sacrebleu, 0 to 100: n-grams longer than the answer do not count (effective order)."""
    return float(require("sacrebleu").sentence_bleu(answer, [expected], tokenize=bleu_tokens([expected])).score)


def chrf(answer: str, expected: str) -> float:
    """Sentence chrF2 (Popović, 2015) by sacrebleu, 0 to 100: F-score of character n-grams up to six."""
    return float(require("sacrebleu").sentence_chrf(answer, [expected]).score)


def distinct_n(answers: Iterable[str], n: int) -> float:
    """Share of n-grams of words that are no repetition (Li et al., 2016), over all answers; 0 if there are none."""
    grams = Counter(gram for answer in answers for gram in _n_grams(tokens(answer), n))
    return len(grams) / grams.total() if grams else 0.0


def normalised(text: str) -> str:
    """In lower case and half width, without punctuation and the articles a, an, the; white space as single spaces.

    ASCII punctuation is left out as in SQuAD ("U.S." is "us"), other punctuation ends a word. Decimal points and the
    minus of a number stay. A text of articles alone, such as the choice "A", stays too.
    """
    text = _folded(text).translate(_ALIKE)
    kept = {match.start() for match in _OF_NUMBERS.finditer(text)}
    plain = "".join(char if at in kept or not unicodedata.category(char).startswith("P")
                    else "" if char.isascii() else " " for at, char in enumerate(text))
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split())


def words(text: str) -> list[str]:
    """What stands between the spaces of the `normalised` text; each character of Chinese and Japanese by itself."""
    return _HAN_OR_REST.findall(normalised(text))


def tokens(text: str) -> list[str]:
    """Words in lower case, runs of letters and digits; each character of Chinese and Japanese by itself."""
    return _TOKENS.findall(text.lower())


METRICS: dict[str, TextMetric] = {
    "exact_match": exact_match,
    "contains": contains,
    "normalised_match": normalised_match,
    "token_f1": token_f1,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
    "bleu": bleu,
    "chrf": chrf,
    "distinct_1": lambda answer, _: distinct_n([answer], 1),
    "distinct_2": lambda answer, _: distinct_n([answer], 2),
}
# Of these the figure of many answers is not the mean of each one's.
_CORPUS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "bleu": lambda answers, expected: float(
        require("sacrebleu").corpus_bleu(answers, [expected], tokenize=bleu_tokens(expected)).score),
    "chrf": lambda answers, expected: float(require("sacrebleu").corpus_chrf(answers, [expected]).score),
    "distinct_1": lambda answers, _: distinct_n(answers, 1),
    "distinct_2": lambda answers, _: distinct_n(answers, 2),
}
_PACKAGES = {"rouge1": "rouge_score", "rouge2": "rouge_score", "rougeL": "rouge_score", "bleu": "sacrebleu",
             "chrf": "sacrebleu"}
_SPELLINGS = {re.sub(r"[-_ ]", "", name).lower(): name for name in METRICS} | {"normalizedmatch": "normalised_match"}


def metric_name(name: str, where: str = "metrics") -> str:
    """The name in `METRICS` of a metric that people may write as "ROUGE-L", "chrF" or "exact match".

    Args:
        where: the option it was named in, for the error.

    Raises:
        OptionError: there is no such metric.
        MissingDependencyError: the package that computes it is not installed.
    """
    found = _SPELLINGS.get(re.sub(r"[-_ ]", "", str(name)).lower())
    if found is None:
        raise OptionError("no such metric", where=where, found=repr(name), expected="one of " + ", ".join(METRICS),
                          fix=nearest(str(name), METRICS))
    if found in _PACKAGES:
        require(_PACKAGES[found])
    return found


def corpus_score(name: str, answers: Sequence[str], expected: Sequence[str]) -> float:
    """The figure of all answers: of bleu, chrf and distinct_n their own over the corpus, of others the mean.

    Args:
        name: a key of `METRICS`.
        answers, expected: as many of each, at least one.
    """
    if name in _CORPUS:
        return _CORPUS[name](answers, expected)
    scores = [METRICS[name](answer, wanted) for answer, wanted in zip(answers, expected, strict=True)]
    return sum(scores) / len(scores)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _n_grams(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def bleu_tokens(expected: Sequence[str]) -> str:
    """sacrebleu's tokenizer for these texts: `zh` cuts Chinese into characters and everything else as `13a` does."""
    return "zh" if any(re.search(f"[{_HAN}]", text) for text in expected) else "13a"


class _Tokens:
    """`tokens`, as rouge-score wants to be given it."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    require("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Tokens())
