"""What stands in data that should not be learnt: secrets, personal data, copies, and rows of the test split."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.base.progress import tell
from gazelle.data.formats import to_conversations
from gazelle.data.parse import Row
from gazelle.data.read import stream_rows
from gazelle.data.similar import Bands, digest, grams, near_rows, plain
from gazelle.guard.checker import KINDS, SafetyChecker

COPIES = ("duplicate", "near_duplicate")
LEAKS = ("leak", "near_leak", "leaked_prompt")
GROUPS = {"secret": KINDS["secret"], "pii": KINDS["pii"], "duplicate": COPIES, "leak": LEAKS}
KEPT = 10_000  # findings that a report lists; all are counted


@dataclass(frozen=True)
class RowFinding:
    """Something in a row.

    Attributes:
        kind: of a secret or personal data as in `gazelle.guard`; "duplicate", "near_duplicate"; of a test row "leak",
            "near_leak" (the row is in the training data) or "leaked_prompt" (the prompt is, with another answer).
        where: file and line of the row.
        column: where in the row, such as "messages[1].content"; "" for the row as a whole.
        start, end: characters of that text; None for the row as a whole.
        other: file and line of the row it equals.
    """

    kind: str
    where: str
    reason: str
    column: str = ""
    start: int | None = None
    end: int | None = None
    other: str = ""


@dataclass
class ScanReport:
    """What a scan saw.

    Attributes:
        rows, against: rows read of the data, and of the test split.
        counts: kind -> how many were found, the most first.
        findings: the first `KEPT`, rows' contents in order, then copies and leaks. None of them holds any text.
    """

    rows: int = 0
    against: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[RowFinding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def failing(self, wanted: Sequence[str]) -> int:
        """How many findings there are of the kinds and groups named, as `parse_fail_on` returns them."""
        return sum(self.counts.get(kind, 0) for kind in wanted)


def parse_fail_on(names: str) -> tuple[str, ...]:
    """The kinds that "secret,leak", "email" or "any" stand for.

    Raises:
        OptionError: a name that is neither a kind nor a group.
    """
    kinds = [kind for group in GROUPS.values() for kind in group]
    chosen: list[str] = []
    for name in (part.strip().replace("-", "_") for part in names.split(",")):
        if name == "any":
            chosen += kinds
        elif name in kinds and name not in GROUPS:
            chosen.append(name)
        elif name in GROUPS:
            chosen += GROUPS[name]
        else:
            raise OptionError("unknown kind of finding", where="--fail-on", found=name or "nothing",
                              expected="any, " + ", ".join([*GROUPS, *(kind for kind in kinds if kind not in GROUPS)]),
                              fix=nearest(name, ["any", *GROUPS, *kinds]))
    return tuple(dict.fromkeys(chosen))


def scan_data(source: Any, against: Any = None, *, checker: SafetyChecker | None = None, threshold: float = 0.8,
              token: str | None = None) -> ScanReport:
    """Look at every text of every row, and for rows that are the same or nearly. Rows are read twice, never all held.

    Args:
        source: whatever `read_rows` takes.
        against: the test split, likewise; its rows are looked for in `source`.
        checker: what is looked for in texts; default: all personal data and secrets. Its actions do not matter.
        threshold: the share of character 5-grams that nearly equal rows have in common.
        token: access token for data sets of the hub.

    Raises:
        DataError: as `read_rows`.
        OptionError: a threshold that is none.
    """
    if not 0 < threshold <= 1:
        raise OptionError("a threshold is a share", where="threshold", found=threshold, expected="above 0, at most 1",
                          fix="leave it out for 0.8")
    return _Scan(source, against, checker or SafetyChecker(), threshold, token).run()


class _Scan:
    """One scan. Rows of the data have the numbers from 0 on, those of the test split follow."""

    def __init__(self, source: Any, against: Any, checker: SafetyChecker, threshold: float, token: str | None) -> None:
        self.source, self.against, self.checker, self.threshold, self.token = source, against, checker, threshold, token
        self.report = ScanReport()
        self.counts: Counter[str] = Counter()
        self.places: list[str] = []
        self.same: set[int] = set()

    def run(self) -> ScanReport:
        bands, rows, prompts = Bands(), dict[int, int](), dict[int, int]()
        for number, (row, where) in enumerate(self._rows()):
            self.places.append(where)
            texts = list(texts_of(row))
            self._contents(texts, where)
            whole = plain("\n".join(text for _, text in texts))
            self._copies(number, whole, rows, row, prompts)
            if number not in self.same and whole:
                bands.add(number, grams(whole))
            tell("rows", number + 1)
        if not self.report.rows:
            raise DataError("there are no rows", where=str(self.source), found="0 rows", expected="at least one row",
                            fix="check that the source was written completely")
        tell("near rows")
        candidates = bands.candidates()
        again = ((number, plain("\n".join(text for _, text in texts_of(row))))
                 for number, (row, _) in enumerate(self._rows())) if candidates else iter(())
        for number, earlier, index in near_rows(again, candidates, self.threshold):
            leak = number >= self.report.rows
            if leak and earlier >= self.report.rows:
                continue  # copies within the test split are its own affair
            self._add(RowFinding("near_leak" if leak else "near_duplicate", self.places[number],
                                 f"{index:.0%} of it is in another row" + (" of the training data" if leak else ""),
                                 other=self.places[earlier]))
        self.report.counts = dict(self.counts.most_common())
        return self.report

    def _rows(self) -> Iterator[Row]:
        yield from self._counted("rows", stream_rows(self.source, token=self.token))
        if self.against is not None:
            yield from self._counted("against", stream_rows(self.against, split="eval", token=self.token))

    def _counted(self, name: str, rows: Iterator[Row]) -> Iterator[Row]:
        """Rows, whose number is in the report when the last has been read."""
        number = 0
        for row in rows:
            number += 1
            yield row
        setattr(self.report, name, number)

    def _contents(self, texts: list[tuple[str, str]], where: str) -> None:
        for column, text in texts:
            for found in self.checker.check(text).findings:
                self._add(RowFinding(found.kind, where, found.reason, column, found.start, found.end))

    def _copies(self, number: int, whole: str, rows: dict[int, int], row: Mapping[str, Any],
                prompts: dict[int, int]) -> None:
        """Rows and prompts seen before. Once the test split has begun, nothing new is noted."""
        test, key, asked = bool(self.report.rows), digest(whole), prompt_of(row)
        prompt = None if asked is None else digest(plain(asked))
        if key in rows:
            self.same.add(number)
            kind, reason = (
                ("leak", "the training data has the same row") if test else ("duplicate", "the same row again")
            )
            self._add(RowFinding(kind, self.places[number], reason, other=self.places[rows[key]]))
        elif test and prompt in prompts:
            self._add(RowFinding("leaked_prompt", self.places[number], "the training data has the same prompt",
                                 other=self.places[prompts[prompt]]))
        if not test:
            rows.setdefault(key, number)
            if prompt is not None:
                prompts.setdefault(prompt, number)

    def _add(self, finding: RowFinding) -> None:
        self.counts[finding.kind] += 1
        if len(self.report.findings) < KEPT:
            self.report.findings.append(finding)


def texts_of(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a row, with its place: ("messages[1].content", "…"). Names of roles of turns are no texts."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        roles = {"role": "content", "from": "value"}  # where the other is there, too; a mail's sender is a text
        for key, entry in value.items():
            if roles.get(key) not in value:
                yield from texts_of(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from texts_of(entry, f"{name}[{index}]")
    elif value is not None and not isinstance(value, bool):
        yield name, str(value)


def prompt_of(row: Mapping[str, Any]) -> str | None:
    """What stands before the last answer of a row in a known format; None for texts and rows of other formats."""
    try:
        (conversation,) = to_conversations([(dict(row), "")])
    except DataError:
        return None
    turns = conversation.turns
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    return "\n".join(turn.content for turn in turns[:last]) or None
