"""The commands and their options. Each command's work is in its own file, imported when it runs: help stays instant."""

from pathlib import Path
from typing import Annotated

import typer

from gazelle.cli.serve_options import serve, serve_key

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
        bool, typer.Option("--print-recipe", help="Print the recipe with overrides and defaults, those of train apart.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Use a folder that holds an earlier run.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics of the run on this loopback port.")
    ] = None,
) -> None:
    """Fine-tune as a recipe says."""
    from gazelle.cli.train import train_command

    train_command(recipe, overrides or [], dry_run=dry_run, print_recipe=print_recipe, resume=resume,
                  overwrite=overwrite, metrics_port=metrics_port)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    script: Annotated[Path, typer.Argument(help="Python file written for Unsloth or TRL.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="NAME=PATH: a folder or GGUF file in place of a hub name.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="NAME=PATH: a file or folder in place of a hub name.")
    ] = None,
) -> None:
    """Run a script written for Unsloth or TRL, unchanged."""
    from gazelle.cli.run import run_command

    run_command(script, arguments or [], model or [], dataset or [])


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
def export(
    model: Annotated[str, typer.Argument(help="Folder that training wrote, or any checkpoint.")],
    to: Annotated[
        list[str] | None,
        typer.Option(help="Format and ways: gguf:q4_k_m,q8_0, merged, merged:lora. Repeat it for several formats."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder. Default: MODEL-FORMAT.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to verify with and to calibrate on. Default: those of the run.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask each export what the model in memory is asked.")
    ] = False,
    llama: Annotated[Path | None, typer.Option(help="Folder of llama.cpp. Default: what is installed.")] = None,
    vllm: Annotated[Path | None, typer.Option(help="A Python that has vLLM, to verify with.")] = None,
) -> None:
    """Write a model, its adapter merged, in other formats, and verify that they answer as it does."""
    from gazelle.cli.export import export_command

    export_command(model, to or ["gguf:q8_0"], output, data=data, verify=verify, llama=llama, vllm=vllm)


@app.command()
def scan(
    data: Annotated[str, typer.Argument(help="File, folder or hub name.")],
    against: Annotated[str | None, typer.Option(help="The test split, whose rows should not be in the data.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="File to write all findings to.")] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 if there is any: secret, pii, duplicate, leak, a kind such as email, or any."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Overlap from which rows are nearly the same.")] = 0.8,
) -> None:
    """Look through data for secrets, personal data, copies, and rows of the test split."""
    from gazelle.cli.scan import scan_command

    scan_command(data, against, as_json, fail_on, threshold)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hub name, folder or GGUF file; only its config is read.")],
    seq: Annotated[int | None, typer.Option(help="Longest row in tokens. Default: 2048, or the model's limit.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a micro-batch.")] = 2,
    budget: Annotated[str | None, typer.Option(help='Memory, such as "12GB". Default: what is free.')] = None,
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help="NF4 weights. Default: on a GPU.")
    ] = None,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="int8 weights.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train every weight.")] = False,
    optim: Annotated[str, typer.Option(help="Optimizer.")] = "adamw_8bit",
    precision: Annotated[str, typer.Option(help="auto, or fp8.")] = "auto",
    checkpointing: Annotated[str, typer.Option(help="auto, true, false or offload.")] = "auto",
) -> None:
    """Predict memory and time of training a model, and what it would keep, without loading its weights."""
    from gazelle.cli.plan import plan_command

    plan_command(model, seq=seq, batch=batch, budget=budget, r=r, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit,
                 full=full, optim=optim, precision=precision, checkpointing=checkpointing)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, a kernel really run, memory, optional parts."""
    from gazelle.cli.doctor import doctor_command

    doctor_command()


@app.command()
def bench(
    rows: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each, after warm-up steps.")] = 7,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a training step on this machine, beside Hugging Face + PEFT."""
    from gazelle.cli.bench import bench_command

    bench_command(rows, steps, out, as_json=as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
) -> None:
    """List the recipes that come with gazelle, or print one to start from."""
    from gazelle.cli.recipes import recipes_command

    recipes_command(name)


app.command()(serve)
app.command()(serve_key)


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
