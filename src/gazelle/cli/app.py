"""The commands and their options. Each command's work is in its own file, imported when it runs: help stays instant."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="gazelle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Fine-tune open-weight language models.",
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for adapter, report and scores.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 3407,
) -> None:
    """Teach a real 135M model the documents of a small company, and prove it on questions it has not seen."""
    from gazelle.cli.demo import run_demo

    run_demo(output, seed)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see `gazelle recipes`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, put over the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the data, print its report and stop.")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole recipe, defaults included, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Use a folder that holds an earlier run.")] = False,
) -> None:
    """Fine-tune as a recipe says."""
    from gazelle.cli.train import train_command

    train_command(recipe, overrides or [], dry_run=dry_run, print_recipe=print_recipe, resume=resume,
                  overwrite=overwrite)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder that training wrote, any checkpoint, or a GGUF file.")],
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="4-bit weights. Default: as in training, else as they are stored.")
    ] = False,
) -> None:
    """Talk to a model in the terminal. Questions can also be piped in, one a line."""
    from gazelle.cli.chat import chat_command

    chat_command(model, system=system, max_new_tokens=max_new_tokens, temperature=temperature,
                 load_in_4bit=load_in_4bit)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, a kernel really run, memory, optional parts."""
    from gazelle.cli.doctor import doctor_command

    doctor_command()


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
) -> None:
    """List the recipes that come with gazelle, or print one to start from."""
    from gazelle.cli.recipes import recipes_command

    recipes_command(name)


def _version(asked: bool) -> None:
    if asked:
        from gazelle import __version__

        typer.echo(f"gazelle {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    """Options that stand before a command."""
