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
    eval_split: Annotated[
        float | None, typer.Option("--eval-split", help="Hold out this share of the rows; rows alike stay together.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics of the run on this loopback port.")
    ] = None,
) -> None:
    """Fine-tune as a recipe says."""
    from gazelle.cli.train import train_command

    overrides = [*(overrides or []), *([] if eval_split is None else [f"data.eval_split={eval_split}"])]
    train_command(recipe, overrides, dry_run=dry_run, print_recipe=print_recipe, resume=resume,
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


@app.command(name="eval")
def eval_(
    models: Annotated[list[str], typer.Argument(
        help="Folder, hub name, GGUF file or http://host:port/v1#name; NAME=PLACE names it. The first is compared with."
    )],
    cases: Annotated[Path | None, typer.Option(help="File of test cases, or of rows as training takes them.")] = None,
    metrics: Annotated[str, typer.Option(help="Names with commas between.")] = "accuracy,token_f1,perplexity,latency",
    judge: Annotated[str | None, typer.Option(help="A model that grades answers, as MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Cases answered at a time.")] = 16,
    timed_cases: Annotated[int, typer.Option(min=1, help="Cases answered one at a time, for latency.")] = 20,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="4-bit weights. Default: as in training, else as they are stored.")
    ] = False,
    llama: Annotated[str | None, typer.Option(help="Folder of llama.cpp. Default: what is installed.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the key of an address.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of lm-eval. Repeat it for several.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put tasks' prompts into the chat template.")
    ] = False,
) -> None:
    """Ask models the same test cases, or tasks of lm-eval, and compare them."""
    from gazelle.cli.eval import eval_command

    eval_command(models, cases=cases, metrics=metrics, judge=judge, output=output, max_new_tokens=max_new_tokens,
                 batch_size=batch_size, timed_cases=timed_cases, load_in_4bit=load_in_4bit, llama=llama,
                 api_key_env=api_key_env, tasks=tasks or [], include_path=include_path, limit=limit,
                 apply_chat_template=apply_chat_template)


@app.command()
def rate(
    report: Annotated[Path, typer.Argument(help="Folder that `gazelle eval --output` wrote.")],
    models: Annotated[str, typer.Option(help="Two of its models, a comma between. Default: both.")] = "",
    votes: Annotated[Path | None, typer.Option(help="File of votes. Default: votes.jsonl in the folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order in which answers are shown.")] = None,
) -> None:
    """Rate answers of two models without knowing whose they are: each vote is kept at once; go on whenever you like."""
    from gazelle.cli.rate import rate_command

    rate_command(report, [name.strip() for name in models.split(",") if name.strip()], votes, seed)


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
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that training wrote; runs may still be going.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG file to draw the curves in.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="HTML file for table and curves.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures and settings as JSON.")] = False,
) -> None:
    """Put several runs side by side: what differs, what came of it, and their curves in one picture."""
    from gazelle.cli.compare import compare_command

    compare_command(runs, plot, html, json=as_json)


@app.command()
def recommend(
    data: Annotated[str, typer.Argument(help="File, folder or hub name of the rows.")],
    model: Annotated[str, typer.Option("--model", help="Hub name, folder or GGUF file; weights are not read.")],
    budget: Annotated[str | None, typer.Option(help='Memory, such as "12GB". Default: what is free.')] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Propose a recipe for your rows and a model, with reasons, and write it."""
    from gazelle.cli.recommend import recommend_command

    recommend_command(data, model, budget=budget, output=output)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, a kernel really run, memory, optional parts."""
    from gazelle.cli.doctor import doctor_command

    doctor_command()


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder, hub name or GGUF file. Default: the demo's.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Without MODEL: rows in a batch.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Without MODEL: measured steps of each, after warm-up steps.")] = 7,
    lengths: Annotated[str, typer.Option(help="Of MODEL: lengths in tokens.")] = "256,512",
    batches: Annotated[str, typer.Option(help="Of MODEL: rows at a time.")] = "1,2,4",
    dtype: Annotated[str | None, typer.Option(help="Of MODEL: fp32, bf16 or fp16.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Of MODEL: iterations that do not count.")] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="Of MODEL: iterations that do.")] = 10,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Of MODEL: with LoRA on the engine, and a training step.")
    ] = True,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Of MODEL: 4-bit weights.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result; of MODEL .csv, .md or .png, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a training step beside Hugging Face + PEFT; or prefill, decoding and a training step of MODEL."""
    from gazelle.cli.bench import bench_command, bench_model

    if model is None:
        bench_command(rows, steps, out, as_json=as_json)
        return
    bench_model(model, lengths, batches, dtype=dtype, warmup=warmup, iterations=iterations, train=train,
                load_in_4bit=load_in_4bit, out=out, as_json=as_json)


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
