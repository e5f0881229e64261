"""`gazelle compare`."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gazelle.base.errors import OptionError
from gazelle.base.files import check_writable, staged_file
from gazelle.train.compare import as_json, draw, read_runs, table, write_page


def compare_command(folders: Sequence[Path], plot: Path | None, html: Path | None, *, json: bool) -> None:
    """Print figures and differing settings of runs, and write their curves."""
    for option, path, suffix in (("--plot", plot, ".png"), ("--html", html, ".html")):
        if path is not None:
            if path.is_dir() or path.suffix.lower() != suffix:
                raise OptionError("not a file of this kind", where=option, found=str(path),
                                  expected=f"a file that ends in {suffix}", fix=f"write {path.stem or 'runs'}{suffix}")
            check_writable(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
    runs = read_runs(folders)
    if json:
        typer.echo(as_json(runs))
    else:
        shown = Table()
        shown.add_column("")
        for run in runs:
            shown.add_column(Text(run.name), overflow="fold")
        for what, values in table(runs):
            shown.add_row(Text(what), *map(Text, values))
        Console().print(shown)
    if plot is not None:
        with staged_file(plot) as staging:
            draw(runs).savefig(staging, format="png", dpi=130)
        typer.echo(f"curves    {plot}", err=json)
    if html is not None:
        write_page(runs, html)
        typer.echo(f"page      {html}", err=json)
