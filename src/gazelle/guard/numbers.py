"""Numbers that belong to a person: payment cards, accounts, national identifiers, proved by check digits or ranges.

Digits may be spelt apart or grouped as people group them. Checksums and registries are python-stdnum's.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

from gazelle.base.optional import require
from gazelle.guard.detector import DIGITS, Candidate, Detector, Span, Words, named

# Words before a number that say what it is. The nearer of the two kinds counts.
_ORDINARY = Words(
    r"order|track|invoice|\bref\b|reference|ticket|serial|\bsku\b|isbn|imei|parcel|shipment|model|part n|\bcase\b",
    r"batch|product|issue|commit|build|version|timestamp|\bpo\b|\buid\b|\bid[:=# ]|#\z",
    "订单|单号|运单|快递|流水|编号|发票|货号|批次|型号|序列号|工号|学号",
)
_OF_CARD = Words("card|visa|amex|mastercard|american express|discover|unionpay|debit|credit", "卡|银联|信用|储蓄")
_OF_SSN = Words(r"\bssn\b|social[ \-]security", "社会安全|社安")
_OF_NINO = Words(r"\bnino?\b|national insurance", "国民保险")


@dataclass(frozen=True)
class Run:
    """Neighbouring groups of digits.

    Attributes:
        digits: the groups joined, X at the end of a Chinese ID included.
        sizes: digits in each group.
    """

    digits: str
    sizes: tuple[int, ...]
    start: int
    end: int


_GROUP = re.compile(r"[0-9]+[Xx]?")


_LENGTHS = (*range(19, 12, -1), 9)  # of what the checks know


def runs(candidate: Candidate) -> Iterator[Run]:
    """Runs of whole groups with as many digits as a check knows, longest first at each start; in linear time."""
    groups = [(found[0], *found.span()) for found in _GROUP.finditer(candidate.text, candidate.start, candidate.end)]
    sizes = [len(part) for part, _, _ in groups]
    begins = [0, *itertools.accumulate(sizes)]
    ends = {begin: number for number, begin in enumerate(begins)}  # digits so far -> groups so far
    digits = "".join(part for part, _, _ in groups)
    for first, (begin, size) in enumerate(zip(begins, sizes, strict=False)):
        if size == 1 and first and sizes[first - 1] == 1:
            continue  # digits that are spelt apart begin where the first of them stands
        for length in _LENGTHS:
            if (last := ends.get(begin + length)) is not None:
                yield Run(digits[begin:begin + length], tuple(sizes[first:last]), groups[first][1],
                          groups[last - 1][2])


def valid(module: str, number: str) -> bool:
    """What a module of python-stdnum says of a number."""
    return bool(_stdnum(module).is_valid(number))


@cache
def _stdnum(module: str) -> Any:
    require("stdnum")
    return import_module(f"stdnum.{module}")


def _issuer(digits: str) -> bool:
    """Whether an issuer gives out cards that begin so and have this length."""
    size, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    return (
        (digits[0] == "4" and size in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and size == 16)
        or (two in (34, 37) and size == 15)
        or ((four == 6011 or two == 65 or 644 <= three <= 649) and size in (16, 19))
        or ((two in (36, 38) or 300 <= three <= 305) and size == 14)
        or (3528 <= four <= 3589 and size in (16, 19))
        or (two == 62 and 16 <= size <= 19)
        or (2200 <= four <= 2204 and size == 16)
    )


def _grouped(sizes: Sequence[int]) -> bool:
    """Groups as people write card numbers: one, all of a size but for the last, or 4-6-5 and 4-6-4."""
    return (len(sizes) == 1 or tuple(sizes) in ((4, 6, 5), (4, 6, 4))
            or (len(set(sizes[:-1])) == 1 and sizes[0] <= 5 and sizes[-1] <= sizes[0]))


_PROVINCES = {
    *range(11, 16),
    *range(21, 24),
    *range(31, 38),
    *range(41, 47),
    *range(50, 55),
    *range(61, 66),
    71,
    81,
    82,
    83,
}


def _before(candidate: Candidate, start: int) -> str:
    """What stands before a run on the same line, in lower case; nothing if that is digits alone, which tell nothing."""
    if start - 40 >= candidate.start:
        return ""
    return candidate.text[max(0, start - 40):start].rpartition("\n")[2].lower()


def _card(run: Run, before: Callable[[], str]) -> float | None:
    if not (run.digits.isdigit() and _issuer(run.digits) and _grouped(run.sizes)):
        return None
    if not valid("luhn", run.digits):
        return None
    said = named(before(), _OF_CARD, _ORDINARY)
    if said is False or (said is None and len(run.digits) in (13, 19) and run.digits[0] == "4" and len(run.sizes) == 1):
        return None  # identifiers of 19 digits are common, such cards are not
    return 1.0 if said or len(run.sizes) > 1 else 0.95


def _chinese_id(run: Run, _: Callable[[], str]) -> float | None:
    if not re.fullmatch(r"[0-9]{17}[0-9Xx]", run.digits) or not (
        len(run.sizes) == 1 or run.sizes in ((6, 8, 4), (6, 4, 4, 4)) or set(run.sizes[:-1]) == {1}
    ):
        return None
    # Not ric.is_valid: it knows no counties that are newer than its table.
    ric, digits = _stdnum("cn.ric"), run.digits.upper()
    try:
        born = ric.get_birth_date(digits)
    except _stdnum("exceptions").ValidationError:
        return None
    is_one = int(digits[:2]) in _PROVINCES and born.year >= 1900 and ric.calc_check_digit(digits) == digits[-1]
    return 1.0 if is_one else None


def _ssn(run: Run, before: Callable[[], str]) -> float | None:
    if not run.digits.isdigit():
        return None
    said = named(before(), _OF_SSN, _ORDINARY)
    written = f"{run.digits[:3]}-{run.digits[3:5]}-{run.digits[5:]}"
    if said is False or (run.sizes != (3, 2, 4) and not said) or not valid("us.ssn", written):
        return None
    return 1.0 if said else 0.9


_CHECKS = {length: (("card", _card), *[("cn_id", _chinese_id)] * (length == 18)) for length in range(13, 20)}
_CHECKS[9] = (("us_ssn", _ssn),)


def _numbers(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    if not candidate.alone("_"):
        return
    done = candidate.start
    for run in runs(candidate):
        if run.start < done:
            continue
        before = partial(_before, candidate, run.start)
        for kind, check in _CHECKS[len(run.digits)]:
            score = check(run, before)
            if score is not None:
                yield kind, (run.start, run.end, score)
                done = run.end
                break


def _iban(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    compact = ""
    for offset, char in enumerate(candidate.found):
        if char in " -":
            continue
        compact += char
        follows = candidate.text[candidate.start + offset + 1:candidate.start + offset + 2]
        if len(compact) >= 15 and not (follows.isascii() and follows.isalnum()) and valid("iban", compact):
            yield "iban", (candidate.start, candidate.start + offset + 1, 1.0)
            return


_NATIONAL = {  # kind -> (form, module of python-stdnum); all have check digits but for the British one
    "es_dni": (r"\b(?:[0-9]{8}|[XYZ][0-9]{7})-?[A-HJ-NP-TV-Z]\b", ("es.dni", "es.nie")),
    "it_cf": (r"(?i)\b[A-Z]{6}[0-9LMNPQRSTUV]{2}[A-EHLMPRST][0-9LMNPQRSTUV]{2}[A-Z][0-9LMNPQRSTUV]{3}[A-Z]\b",
              ("it.codicefiscale",)),
    "br_cpf": (r"\b[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}\b", ("br.cpf",)),
    "fr_nir": (r"\b[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]) ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}\b", ("fr.nir",)),
    "kr_rrn": (r"\b[0-9]{2}(?:0[1-9]|1[0-2])[0-3][0-9]-[0-9]{7}\b", ("kr.rrn",)),
}


def _national(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    for (kind, (_, modules)), found in zip(_NATIONAL.items(), candidate.match.groups(), strict=True):
        if found is not None and candidate.alone("-_") and any(valid(module, found) for module in modules):
            yield kind, (candidate.start, candidate.end, 1.0)


# Prefixes that are not given out, and those that stand for no person.
_NO_NINO = {"BG", "GB", "KN", "NK", "NT", "TN", "ZZ", "OO", "CR", "FY", "MW", "NC", "PP", "PZ"}


def _nino(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    compact = candidate.found.replace(" ", "").upper()
    said = named(candidate.before(), _OF_NINO, _ORDINARY)
    if candidate.alone("-_") and compact[:2] not in _NO_NINO and said is not False and (said or " " in candidate.found):
        yield "uk_nino", (candidate.start, candidate.end, 1.0 if said else 0.9)


NUMBERS = (
    Detector("pii", {"card": "a payment card: issuer, length and check digit are right",
                     "cn_id": "a Chinese resident ID: region, date and check digit are right",
                     "us_ssn": "a US social security number, in ranges that are given out"},
             r"[0-9](?:[ .\-_]{0,3}[0-9]){8,}(?:[ .\-]?[Xx]\b)?", _numbers, DIGITS),
    Detector("pii", {"iban": "a bank account (IBAN): country, length and check digits are right"},
             r"(?i)\b[A-Z]{2}[0-9]{2}(?:[ \-]?[A-Z0-9]){11,30}", _iban, DIGITS),
    Detector("pii", {kind: f"a national identifier ({kind}): its check digits are right" for kind in _NATIONAL},
             "|".join(f"({form})" for form, _ in _NATIONAL.values()), _national),
    Detector("pii", {"uk_nino": "a British national insurance number"},
             r"(?i)\b[ABCEGHJ-PRSTW-Z][ABCEGHJ-NPRSTW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]\b", _nino, DIGITS),
)
