"""`gazelle train`."""

from collections.abc import Sequence
from pathlib import Path

import typer

from gazelle.facade.run import check_recipe, run
from gazelle.facade.run import dry_run as look
from gazelle.train.recipe import load_recipe


def train_command(
    path: Path, overrides: Sequence[str], *, dry_run: bool, print_recipe: bool, resume: bool, overwrite: bool
) -> None:
    """Run a recipe, or only show what it says or what its data looks like."""
    recipe = load_recipe(path, overrides)
    if print_recipe:
        typer.echo(recipe.as_yaml(), nl=False)
        return
    check_recipe(recipe, resume=resume, overwrite=overwrite)
    if dry_run:
        typer.echo("\n".join(look(recipe).lines()))
        return
    run(recipe, resume=resume)
    folder = recipe.output_dir
    typer.echo(f"\nadapter and tokenizer  {folder}\nreport                 {folder}/report.html\n"
               f"talk to it             gazelle chat {folder}")
