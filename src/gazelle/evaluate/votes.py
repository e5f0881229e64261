"""What people prefer: pairs of answers shown without names, and votes that are kept at once."""

import datetime
import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.evaluate.statistics import mcnemar

Choice = Literal["a", "b", "tie", "skip"]


@dataclass(frozen=True)
class Pair:
    """A question with two models' answers, in the order in which they are shown."""

    question: str
    models: tuple[str, str]
    answers: tuple[str, str]

    @property
    def key(self) -> str:
        """The same for the same question and answers, in whichever order: a vote counts as long as these stand."""
        answers = sorted(zip(self.models, self.answers, strict=True))
        parts = [self.question, *(part for answer in answers for part in answer)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    @property
    def same(self) -> bool:
        """True if there is nothing to choose between."""
        return self.answers[0].strip() == self.answers[1].strip()


@dataclass(frozen=True)
class Vote:
    """A choice between the answers of `models`, shown as a and b. `key` is the pair's."""

    key: str
    models: tuple[str, str]
    choice: Choice
    at: str = ""

    @property
    def winner(self) -> str | None:
        """The preferred model; None for a tie, and for a pair that was passed over."""
        return {"a": self.models[0], "b": self.models[1]}.get(self.choice)


@dataclass(frozen=True)
class Tally:
    """Votes counted: for each of the two models, ties, pairs passed over, pairs of the same answer.

    `p` is the sign test's: how often chance alone gives so uneven a result, ties left out.
    """

    wins: dict[str, int]
    ties: int
    skipped: int
    same: int
    p: float


def pairs_of(report: str | Path, models: Sequence[str] = (), seed: int | None = None) -> list[Pair]:
    """Pairs of answers out of an evaluation, in random order within each pair.

    Args:
        report: the folder that `gazelle eval --output` wrote, or its evaluation.json.
        models: two of its models; may be left out where it has no more.
        seed: of the order; left out, it cannot be foreseen.

    Raises:
        DataError: there is no evaluation, or it is damaged.
        OptionError: no such model, or not two.
    """
    path = Path(report)
    content = _read(path / "evaluation.json" if path.is_dir() else path)
    present = list(content["models"])
    for name in models:
        if name not in present:
            raise OptionError("the evaluation has no such model", where="--models", found=name,
                              expected=", ".join(present), fix=nearest(name, present))
    chosen = list(dict.fromkeys(models or present))
    if len(chosen) != 2:
        raise OptionError("two models are compared", where="--models", found=", ".join(chosen) or "none",
                          expected=f"two of {', '.join(present)}", fix="name them: --models A,B")
    order = random.Random(seed) if seed is not None else random.SystemRandom()  # noqa: S311
    pairs = []
    for case in content["cases"]:
        first, second = order.sample(chosen, 2)
        question = "\n\n".join(message["content"] if len(case["messages"]) == 1 else
                               f"[{message['role']}] {message['content']}" for message in case["messages"])
        pairs.append(Pair(question, (first, second), (case["answers"][first], case["answers"][second])))
    return pairs


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(content[part], kind) for part, kind in (("models", dict), ("cases", list))) and all(
                case["messages"] and isinstance(case["answers"][name], str) for case in content["cases"]
                for name in content["models"]):
            return dict(content)
        found = "other JSON"
    except FileNotFoundError:
        found = "nothing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = str(error)
    raise DataError("there is no evaluation", where=str(path), found=found,
                    expected="the folder that `gazelle eval … --output FOLDER` wrote", fix="run that first")


class VoteFile:
    """Votes as JSON, one a line, each on the disk before the next is asked for.

    What a kill left of a line is cut off when the next vote is written.

    Raises:
        DataError: a line that is no vote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.votes: dict[str, Vote] = {}  # the last vote of each pair
        if self.path.is_dir():
            raise DataError("votes are kept in a file", where=str(path), found="a folder", expected="a file",
                            fix=f"write --votes {self.path / 'votes.jsonl'}")
        data = self.path.read_bytes() if self.path.exists() else b""
        self._whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:self._whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                vote = Vote(entry["key"], (entry["models"][0], entry["models"][1]), entry["choice"], entry["at"])
                if vote.choice not in ("a", "b", "tie", "skip"):
                    raise ValueError(vote.choice)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError("this is no vote", where=f"{path}, line {number}", found=line.decode(errors="replace"),
                                expected='{"key": ..., "models": [..., ...], "choice": "a", "at": ...}',
                                fix="mend or remove the line") from error
            self.votes[vote.key] = vote

    def add(self, pair: Pair, choice: Choice) -> None:
        """Keep a vote: when this returns, it is on the disk."""
        vote = Vote(pair.key, pair.models, choice, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        with self.path.open("ab") as file:
            if self._whole < file.tell():
                file.truncate(self._whole)
            file.write(json.dumps(asdict(vote), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        self.votes[vote.key] = vote


def tally(pairs: Sequence[Pair], votes: dict[str, Vote]) -> Tally:
    """Count the votes on these pairs; those on other answers do not count."""
    wins = dict.fromkeys(sorted(pairs[0].models), 0) if pairs else {}
    same = sum(pair.same for pair in pairs)
    cast = [votes[pair.key] for pair in pairs if pair.key in votes]
    for vote in cast:
        if vote.winner is not None:
            wins[vote.winner] += 1
    first, second = wins.values() if wins else (0, 0)
    return Tally(wins, sum(vote.choice == "tie" for vote in cast), sum(vote.choice == "skip" for vote in cast), same,
                 mcnemar(first, second))
