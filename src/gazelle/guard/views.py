"""A text as a reader sees it: Unicode tricks undone, with the way back to the characters of the original.

The folded view is what detectors read: compatibility forms (NFKC: full-width, circled, mathematical letters),
look-alike letters of other scripts as Latin ones (Unicode's confusables), no accents, no invisible characters, Chinese
numerals in long runs of digits as digits. Block patterns look at two more: letters spelt apart put together, and leet
read as letters.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazelle.base.optional import require

Offsets = NDArray[np.int64]

_NUMERALS = str.maketrans("零〇○一二三四五六七八九幺壹贰叁肆伍陆柒捌玖", "00012345678911" + "23456789")
_DIGITS = "0-9零〇○一二三四五六七八九幺壹贰叁肆伍陆柒捌玖"
# Long runs only, which no prose has: 一一 and 三十 stay what they are.
_NUMERAL_RUN = re.compile(rf"[{_DIGITS}](?:[ \-]?[{_DIGITS}]){{6,}}")
# Single letters, each followed by the same kind of gap. Nothing here can backtrack: every step takes exactly one form.
_SPELT = re.compile(r"(?<![^\W_])[^\W\d_](?:[ .,_*~|/·•・\-]{1,2}[^\W\d_](?![^\W_])){2,}")
_SPELT_HAN = re.compile(r"[\u4e00-\u9fff](?:[ ._*~|/·•・\-][\u4e00-\u9fff])+")
_GAP = re.compile(r"[ .,_*~|/·•・\-]+")
_LEET_WORD = re.compile(r"[A-Za-z0-9@$!|+]{4,24}")
_LEET = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "@": "a", "$": "s", "!": "i", "|": "l", "+": "t"}
_LEET_TABLES = (str.maketrans(_LEET), str.maketrans(_LEET | {"1": "l", "!": "l"}))

# Accents over Latin, Greek and Cyrillic, enclosing marks and variation selectors: vowels of other scripts are no marks.
_MARKS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\U000e0100-\U000e01ef]+"
)
_UNSEEN = "\u115f\u1160\u3164\uffa0\u2800"  # fillers of Hangul, and the empty Braille pattern


@dataclass(frozen=True)
class View:
    """A form of a text.

    Attributes:
        text: the form.
        offsets: (len(text) + 1,) for each character where its original begins, and where the last one ends; None
            where the form has the positions of the original.
    """

    text: str
    offsets: Offsets | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Where `text[start:end]` lies in the original, with what cannot be seen behind it."""
        return self.origin(start), self.origin(end)

    def origin(self, position: int) -> int:
        """Where the character `position` of the form begins in the original."""
        return position if self.offsets is None else int(self.offsets[position])

    def replaced(self, text: str, offsets: Offsets | None) -> "View":
        """A form of this form, with its way back to the original."""
        if offsets is None:
            return View(text, self.offsets)
        return View(text, offsets if self.offsets is None else self.offsets[offsets])


def fold(text: str) -> View:
    """The folded view. The time is linear in the text, whatever it holds."""
    if text.isascii():
        return View(text)
    table = {ord(char): _folded(char) for char in set(text) if not char.isascii()}
    changed = {code: new for code, new in table.items() if len(new) != 1}
    if changed:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        lengths = np.ones(len(codes), np.int64)
        for code, new in changed.items():
            lengths[codes == code] = len(new)
        offsets: Offsets | None = np.append(np.repeat(np.arange(len(codes)), lengths), len(codes))
    else:
        offsets = None
    view = View(text.translate(table), offsets)
    runs = _NUMERAL_RUN.sub(lambda run: run[0].translate(_NUMERALS), view.text)
    return View(runs, view.offsets)


def together(view: View) -> View | None:
    """Letters spelt apart ("p a s s", "p.a.s.s") put together, and gaps of several spaces made one; None if no letters
    are."""
    runs = [run for form in (_SPELT, _SPELT_HAN) for run in form.finditer(view.text)]
    if not runs:
        return None
    keep = np.ones(len(view.text) + 1, bool)
    for run in runs:
        for gap in _GAP.finditer(view.text, *run.span()):
            keep[gap.start():gap.end()] = False
            if len(gap[0]) > 1 and gap[0].isspace():  # between words of letters spelt apart
                keep[gap.start()] = True
    kept = np.flatnonzero(keep)
    return view.replaced("".join([view.text[index] for index in kept[:-1]]), kept)


def leet(view: View) -> list[View]:
    """Words in which digits and signs stand for letters read as words; none if there are no such words."""
    found: list[View] = []
    words = [word.span() for word in _LEET_WORD.finditer(view.text) if _is_leet(word[0])]
    for table in _LEET_TABLES if words else ():
        pieces, position = [], 0
        for start, end in words:
            pieces += [view.text[position:start], view.text[start:end].translate(table)]
            position = end
        found.append(View("".join([*pieces, view.text[position:]]), view.offsets))
    return found


def _is_leet(word: str) -> bool:
    signs = sum(char in _LEET for char in word)
    return 0 < signs <= sum(char.isalpha() for char in word)


@functools.lru_cache(maxsize=65536)
def _folded(char: str) -> str:
    """What one character reads as."""
    category = unicodedata.category(char)
    if category == "Cs":  # half a character, which UTF-8 cannot hold
        return "\ufffd"
    if category == "Cf" or char in _UNSEEN or _MARKS.fullmatch(char):
        return ""
    if category == "Pd" or char == "\u2212":
        return "-"
    if category in ("Zs", "Zl", "Zp"):
        return " " if category == "Zs" else "\n"
    if (digit := unicodedata.digit(char, None)) is not None:  # of any script, circled, on a dark disc
        return str(digit)
    plain = unicodedata.normalize("NFKC", _MARKS.sub("", unicodedata.normalize("NFKD", char)))
    return "".join(_latin(part) for part in plain)


_LETTER = re.compile(
    r"(LATIN (?:SMALL|CAPITAL) LETTER|LATIN LETTER SMALL CAPITAL|REGIONAL INDICATOR SYMBOL LETTER) ([A-Z])"
    r"(?: WITH .+)?$"
)


def _latin(char: str) -> str:
    """The Latin letter that a character looks like, by Unicode's list or by its name: ø, small capitals, 🅿."""
    if char.isascii():
        return char
    if (found := _LETTER.search(unicodedata.name(char, ""))) is not None:
        return found[2] if "CAPITAL LETTER" in found[1] else found[2].lower()
    return _lookalikes().get(char, char)


@functools.cache
def _lookalikes() -> dict[str, str]:
    """Letters of other scripts -> the Latin letter they cannot be told from."""
    require("confusable_homoglyphs")
    from confusable_homoglyphs.confusables import confusables_data as confusables

    return {char: latin for char, others in confusables.items() if len(char) == 1 and not char.isascii()
            and char.isalpha() and not "\u2e80" <= char <= "\ud7ff"
            for latin in (other["c"] for other in others) if len(latin) == 1 and latin.isascii() and latin.isalpha()}
