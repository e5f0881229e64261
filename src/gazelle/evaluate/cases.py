"""Test cases: what a model is asked, and what a right answer is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gazelle.base.errors import DataError
from gazelle.data.conversation import Turn
from gazelle.data.formats import is_messages, to_conversations
from gazelle.data.read import read_rows
from gazelle.data.turns import text_of, turns_of

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        turns: the conversation that the model is to answer, from a system turn, if any, to a user turn.
        expected: the answers that are accepted; metrics that compare with one text take the best of them, perplexity
            the first.
        keys: facts that a right answer holds, as they would be written in it.
        category: what it is counted under; "" for none.
        where: the file and line, or row, it was read from.
    """

    turns: tuple[Turn, ...]
    expected: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    category: str = ""
    where: str = ""

    @property
    def messages(self) -> Messages:
        """The turns as `tokenizer.apply_chat_template` takes them."""
        return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in self.turns]

    @property
    def question(self) -> str:
        """The last turn's text, for people."""
        return self.turns[-1].content


def read_cases(source: Any) -> list[Case]:
    """The test cases of a file, a list, a `Dataset` or whatever else training takes; of several splits, the test part.

    A row is either `{"input": text or messages, "expected": text or list of texts, "keys": [...], "category": ...,
    "system": ...}`, of which only `input` is required, or a row of any format of training: what its last turn says is
    expected then. `keys` and `category` may stand in such rows, too.

    Raises:
        DataError: no rows, or one that is no test case, with where it was read.
    """
    if isinstance(source, list | tuple) and source and all(isinstance(case, Case) for case in source):
        return list(source)
    rows = read_rows(source, split="eval")
    if any(_is_case(row) for row, _ in rows):
        return [_case(row, where) for row, where in rows]
    cases = []
    for (row, where), chat in zip(rows, to_conversations(rows), strict=True):
        if chat.text is not None or chat.turns[-1].role != "assistant" or len(chat.turns) < 2:
            raise DataError("a row has no question with an answer", where=where, found=", ".join(row),
                            expected='{"input": ..., "expected": ...}, or turns of which the last is the assistant\'s',
                            fix="remove the row, or give it a question and an answer")
        if chat.tools:
            raise DataError("a row has tools, which evaluation cannot offer a model", where=where, found="tools",
                            expected="a question that is answered in text", fix="remove such rows")
        cases.append(Case(chat.turns[:-1], (chat.turns[-1].content,), _texts(row.get("keys"), "keys", where),
                          str(row.get("category") or ""), where))
    return cases


def by_category(cases: Iterable[Case]) -> dict[str, list[int]]:
    """Category → the numbers of its cases, in the order in which categories first come up."""
    found: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        found.setdefault(case.category, []).append(number)
    return found


def _is_case(row: Any) -> bool:
    return "input" in row and "instruction" not in row


def _case(row: Any, where: str) -> Case:
    if not _is_case(row):
        raise DataError("a row is no test case, while others are", where=where, found=", ".join(row),
                        expected='{"input": ..., "expected": ...}', fix="give all rows the same columns")
    if is_messages(row["input"]):
        turns = turns_of(row["input"], "input", where)
    else:
        turns = [Turn("user", text_of(row["input"], "input", where))]
    if turns[-1].role == "assistant" or any(turn.role == "system" for turn in turns[1:]):
        raise DataError("'input' is no conversation that a model could answer", where=where,
                        found=", ".join(turn.role for turn in turns),
                        expected="a system turn at most in the first place, and the user's turn in the last",
                        fix="move what the model is to say into 'expected'")
    system = text_of(row.get("system"), "system", where, optional=True)
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    return Case(tuple(turns), _texts(row.get("expected"), "expected", where), _texts(row.get("keys"), "keys", where),
                str(row.get("category") or ""), where)


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    """One text or several; numbers, as JSON and CSV have them, by their digits."""
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    plain = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in items]
    return tuple(text_of(item, name, where) for item in plain)
