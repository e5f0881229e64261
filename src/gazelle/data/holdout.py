"""Rows held out for evaluation, without one in training that gives them away.

Rows that say the same, ask the same, or come from the same document go to one side together.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.data.conversation import Conversation
from gazelle.data.encode import Encoded, plain_text
from gazelle.data.load import Loaded
from gazelle.data.read import Rows


@dataclass(frozen=True)
class HeldOut:
    """How rows were split.

    Attributes:
        share: that was asked for.
        train, evaluation: rows on each side.
        groups: sets of rows that may be parted from each other.
        together: reason → rows that it holds together with others; a row may be in several.
    """

    share: float
    seed: int
    train: int
    evaluation: int
    groups: int
    together: Mapping[str, int]

    def line(self) -> str:
        """The split in one line."""
        why = ", ".join(f"{reason} {count:,}" for reason, count in self.together.items() if count) or "none"
        return f"{self.share:g} by seed {self.seed}, {self.groups:,} groups; rows held together: {why}"


def hold_out(loaded: Loaded, share: float, *, seed: int, rows: Rows | None = None,
             column: str | None = None) -> tuple[Loaded, Loaded]:
    """The rows without about `share` of them, and those, both in their old order. The same seed gives the same rows.

    Two rows stay together if they have the same text, or one answer behind the same prompt, up to case, width, spacing
    and sentence punctuation; or the same value in a column.

    Args:
        loaded: all rows.
        share: above 0 and below 1.
        seed: of the draw.
        rows, column: the rows as they were read, and the column whose values must not be parted.

    Raises:
        OptionError: there is no such column.
        DataError: too few rows, or too many that hang together.
    """
    reasons = _reasons(loaded.conversations)
    if column is not None:
        reasons[f"the same {column}"] = _values(loaded, rows, column)
    held, note = _draw(reasons, len(loaded.conversations), share, seed, loaded.source)

    def part(inside: bool) -> Loaded:
        chats = [chat for at, chat in enumerate(loaded.conversations) if (at in held) is inside]
        return replace(loaded, conversations=chats, held_out=note)

    return part(False), part(True)


def hold_out_encoded(encoded: Encoded, share: float, *, seed: int) -> tuple[Encoded, Encoded, HeldOut]:
    """The same for rows that came tokenised: those with the same tokens, or the same up to what is learnt first."""
    examples = encoded.examples
    whole: list[list[Hashable]] = [[bytes(memoryview(row.input_ids))] for row in examples]  # type: ignore[arg-type]
    asked: list[list[Hashable]] = []
    for row in examples:
        learnt = np.flatnonzero(np.array(row.labels) != -100)
        begin = int(learnt[0]) if len(learnt) else 0
        asked.append([tuple(row.input_ids[:begin])] if begin > 1 else [])
    held, note = _draw({"the same text": whole, "the same prompt": asked}, len(examples), share, seed, encoded.source)
    parts = [Encoded([row for at, row in enumerate(examples) if (at in held) is inside], encoded.max_length)
             for inside in (False, True)]
    return parts[0], parts[1], note


def _reasons(chats: Sequence[Conversation]) -> dict[str, list[list[Hashable]]]:
    """Reason → the keys of each row; rows that share one stay together."""
    return {"the same row": [[chat.where] for chat in chats],
            "the same text": [[_plain(" ".join(turn.content for turn in chat.turns if turn.role != "system")
                                      or chat.text or "")] for chat in chats],
            "the same prompt": [_prompts(chat) for chat in chats]}


def _prompts(chat: Conversation) -> list[Hashable]:
    """What each answer of a conversation follows: one that goes on from another shares its first prompts."""
    found, before = [], ""
    for turn in chat.turns:
        if turn.role == "assistant" and before:
            found.append(before)
        if turn.role != "system":
            before = _plain(f"{before} {turn.content}")
    return list(found)


def _plain(text: str) -> str:
    return plain_text(unicodedata.normalize("NFKC", text))


def _values(loaded: Loaded, rows: Rows | None, column: str) -> list[list[Hashable]]:
    known = {where: row for row, where in rows} if rows is not None else {}
    columns = {name for row in known.values() for name in row}
    if column not in columns:
        raise OptionError("no row has this column", where="eval_group_column", found=column,
                          expected="a column of the data", fix=nearest(column, columns) if columns else
                          "pass rows with columns")
    return [[str(value)] if (value := known[chat.where].get(column)) not in (None, "") else []
            for chat in loaded.conversations]


def _draw(reasons: dict[str, list[list[Hashable]]], count: int, share: float, seed: int,
          source: str) -> tuple[set[int], HeldOut]:
    """The rows that are held out, by number."""
    wanted = round(count * share)
    groups = _groups(reasons.values(), count)
    held: set[int] = set()
    for at in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) + len(groups[at]) <= wanted:
            held.update(groups[at])
    if not held or len(held) == count:
        largest = max(map(len, groups), default=0)
        raise DataError("nothing can be held out", where=source,
                        found=f"eval_split {share:g} of {count} rows in {len(groups)} groups, the largest of {largest}",
                        expected="at least one row on each side, and rows alike on one of them",
                        fix="choose another eval_split (0 holds out nothing), add rows, or name a file of evaluation "
                            "rows")
    together = {}
    for reason, keys in reasons.items():
        shared = Counter(key for row in keys for key in set(row))
        if number := sum(any(shared[key] > 1 for key in row) for row in keys):
            together[reason] = number
    return held, HeldOut(share, seed, count - len(held), len(held), len(groups), together)


def _groups(keys: Iterable[list[list[Hashable]]], count: int) -> list[list[int]]:
    """Rows that share a key, directly or over others, in groups; by their first rows."""
    parent = list(range(count))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for reason in keys:
        first: dict[Any, int] = {}
        for at, row in enumerate(reason):
            for key in row:
                one, other = sorted((root(at), root(first.setdefault(key, at))))
                parent[other] = one
    groups = defaultdict(list)
    for at in range(count):
        groups[root(at)].append(at)
    return list(groups.values())
