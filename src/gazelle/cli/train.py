"""`gazelle train`."""

from collections.abc import Sequence
from pathlib import Path

import typer

from gazelle.facade.run import dry_run as look
from gazelle.facade.run import run
from gazelle.train.recipe import load_recipe
from gazelle.train.telemetry import check_port


def train_command(
    path: Path, overrides: Sequence[str], *, dry_run: bool, print_recipe: bool, resume: bool, overwrite: bool,
    metrics_port: int | None = None,
) -> None:
    """Run a recipe, or only show what it says or what its data looks like."""
    recipe = load_recipe(path, overrides)
    if metrics_port is not None:
        recipe.train["metrics_port"] = metrics_port
    if print_recipe:
        typer.echo(recipe.as_yaml(), nl=False)
        return
    if dry_run:
        typer.echo("\n".join(look(recipe).lines()))
        return
    if recipe.train.get("metrics_port") is not None:
        check_port(recipe.train["metrics_port"])
    run(recipe, resume=resume, overwrite=overwrite)
    folder = recipe.output_dir
    lines = [("adapter and tokenizer" if recipe.lora else "model and tokenizer", folder)]
    if (Path(folder) / "report.html").exists():
        lines.append(("report", f"{folder}/report.html"))
    lines.append(("talk to it", f"gazelle chat {folder}"))
    typer.echo("\n" + "\n".join(f"{what:<24}{where}" for what, where in lines))
