"""`gazelle export`."""

from pathlib import Path

import typer

from gazelle.base.sizes import gigabytes


def export_command(model: str, to: str, output: Path | None) -> None:
    """Write the files and say where they are."""
    from gazelle.facade.exporting import export_checkpoint

    for path in export_checkpoint(model, to, output):
        typer.echo(f"{path}  {gigabytes(path.stat().st_size)}")
