"""`gazelle export`."""

import time
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gazelle.base.progress import watched
from gazelle.base.sizes import megabytes
from gazelle.facade.exporting import Exported, export_checkpoint


def export_command(model: str, to: list[str], output: Path | None, *, data: Path | None, verify: bool,
                   llama: Path | None, vllm: Path | None) -> None:
    """Write the files and say where they are, how large, how long it took, and what verifying found."""
    console = Console(stderr=True)
    began = time.perf_counter()
    done: list[Exported] = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                  console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, count: int, total: int) -> None:
            progress.update(task, description=what, completed=count, total=total or None)

        try:
            with watched(show):
                done.extend(export_checkpoint(  # what came before an error is kept, and shown
                    model, to, output, data=str(data) if data else None, verify=verify,
                    llama=str(llama) if llama else None, vllm=str(vllm) if vllm else None))
        finally:
            progress.stop()
            for exported in done:
                typer.echo(f"{exported.target.label}, {exported.seconds:.1f} s")
                for path in exported.files:
                    typer.echo(f"  {path}  {megabytes(path.stat().st_size)}")
    if verify:
        typer.echo(f"\nall in all {time.perf_counter() - began:.0f} s\n")
        if _show_verification(done):
            raise typer.Exit(1)


def _show_verification(done: list[Exported]) -> bool:
    """Print the table of all exports; True if one of them is wrong."""
    verified = [one for exported in done for one in exported.verified]
    typer.echo(f"Compared with the model in memory, prompts from {verified[0].source}:")
    table = Table()
    table.add_column("")
    names = list(dict.fromkeys(check.name for one in verified for check in one.checks))
    for one in verified:
        table.add_column(Path(one.export).name, overflow="fold")
    table.add_row("read by", *(escape(one.consumer) or "nothing" for one in verified))
    for name in names:
        found = [next((check for check in one.checks if check.name == name), None) for one in verified]
        table.add_row(name, *("-" if check is None else f"[bold red]WRONG[/] {escape(check.found)}" if check.ok is False
                              else escape(check.found) for check in found))
    Console().print(table)
    for one in verified:
        if one.note:
            typer.echo(f"{Path(one.export).name}: {one.note}")
        if one.wrong:
            typer.echo(f"{Path(one.export).name} is not the model in memory: {', '.join(one.wrong)}", err=True)
    unread = sum(not one.consumer for one in verified)
    if not any(one.wrong for one in verified):
        typer.echo(f"{len(verified) - unread} of {len(verified)} exports were read back, and answer as the model in "
                   "memory does.")
    return any(one.wrong for one in verified)
