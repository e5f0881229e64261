"""`gazelle rate`: which of two answers is better, asked of a person who does not know whose they are."""

import sys
import unicodedata
from pathlib import Path

import typer

from gazelle.base.files import check_writable
from gazelle.evaluate.votes import Choice, Pair, VoteFile, pairs_of, tally

_CHOICES: dict[str, Choice] = {"a": "a", "b": "b", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}


def rate_command(report: Path, models: list[str], votes: Path | None, seed: int | None) -> None:
    """Show what has not been voted on yet, keep each vote at once, and print the tally in the end."""
    pairs = pairs_of(report, models, seed)
    folder = report if report.is_dir() else report.parent
    path = votes or folder / "votes.jsonl"
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = VoteFile(path)
    open_pairs = [pair for pair in pairs if pair.key not in kept.votes and not pair.same]
    done = sum(pair.key in kept.votes for pair in pairs)
    typer.echo(f"to rate: {len(open_pairs)}, rated before: {done}. "
               "a or b: the better answer; t: tie; s: skip; q: quit.")
    for number, pair in enumerate(open_pairs, 1):
        choice = _ask(pair, f"{number}/{len(open_pairs)}")
        if choice is None:
            break
        kept.add(pair, choice)
    counted = tally(pairs, kept.votes)
    typer.echo("")
    for name, wins in counted.wins.items():
        typer.echo(f"{name} better: {wins}")
    typer.echo(f"ties: {counted.ties}, skipped: {counted.skipped}, the same answer: {counted.same}\n"
               f"sign test: p = {counted.p:.3g}\nvotes: {path}")


def _ask(pair: Pair, heading: str) -> Choice | None:
    """A person's choice; None at the end of the input, or if they have had enough."""
    typer.echo(f"\n[{heading}] {_plain(pair.question)}\n\n--- a ---\n{_plain(pair.answers[0])}\n\n--- b ---\n"
               f"{_plain(pair.answers[1])}\n")
    while True:
        typer.echo("a, b, t, s, q> ", nl=False)
        sys.stdout.flush()
        line = sys.stdin.readline()
        said = line.strip().lower()
        if not line or said in ("q", "quit"):
            return None
        if said in _CHOICES:
            return _CHOICES[said]


def _plain(text: str) -> str:
    """`text` without control characters: an answer must not move the cursor or recolour the terminal."""
    return "".join(char for char in text.strip() if char in "\n\t" or unicodedata.category(char) != "Cc") or "(nothing)"
