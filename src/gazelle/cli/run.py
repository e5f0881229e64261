"""`gazelle run`."""

from collections.abc import Sequence
from pathlib import Path

import typer

from gazelle.facade.scripts.run import parse_names, run_script


def run_command(script: Path, arguments: Sequence[str], models: Sequence[str], datasets: Sequence[str]) -> None:
    """Run a script, and exit as it does."""
    given, rest = leading_stand_ins(arguments)
    code = run_script(script, rest, parse_names([*models, *given["--model"]], "--model"),
                      parse_names([*datasets, *given["--dataset"]], "--dataset"))
    if code:
        raise typer.Exit(code)


def leading_stand_ins(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The stand-ins that follow the script at once, and the script's own arguments: all that comes behind them.

    A script may have a --model of its own: what is no NAME=PATH is the script's, and so is all behind a "--".
    """
    given: dict[str, list[str]] = {"--model": [], "--dataset": []}
    rest = list(arguments)
    while rest and rest[0].partition("=")[0] in given:
        option, equals, value = rest[0].partition("=")
        taken = 1 if equals else 2
        value = value if equals else "".join(rest[1:2])
        if "=" not in value:
            break
        given[option].append(value)
        del rest[:taken]
    return given, rest[1:] if rest[:1] == ["--"] else rest
