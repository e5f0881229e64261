"""`gazelle recipes`."""

from pathlib import Path

import typer

from gazelle.base.errors import OptionError, nearest

FOLDER = Path(__file__).parent.parent / "recipes"


def recipes_command(name: str | None) -> None:
    """List the shipped recipes with their first comment, or print one."""
    shipped = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if name is None:
        for stem, path in shipped.items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            typer.echo(f"{stem:<16}{first.removeprefix('# ')}")
        typer.echo("\nStart from one:  gazelle recipes qlora > my.yaml\nThen:            gazelle train my.yaml")
        return
    if name not in shipped:
        raise OptionError("no such recipe", where="gazelle recipes", found=name, expected=", ".join(shipped),
                          fix=nearest(name, shipped))
    text = shipped[name].read_text(encoding="utf-8")
    typer.echo(text, nl=False)
