"""`gazelle eval`."""

from pathlib import Path

import typer
from rich.console import Console
from rich.markdown import Markdown

from gazelle.base.errors import OptionError
from gazelle.base.files import check_writable, write_text
from gazelle.evaluate.answerers import Answerer
from gazelle.evaluate.harness import run_tasks
from gazelle.evaluate.pipeline import EvaluationPipeline
from gazelle.facade.evaluating import find_model, named_models


def eval_command(
    models: list[str], *, cases: Path | None, metrics: str, judge: str | None, output: Path | None,
    max_new_tokens: int, batch_size: int, timed_cases: int, load_in_4bit: bool, llama: str | None,
    api_key_env: str | None, tasks: list[str], include_path: Path | None, limit: int | None, apply_chat_template: bool,
) -> None:
    """Ask the models test cases or tasks, print the report, and write it where that is asked for."""
    if (cases is None) == (not tasks):
        raise OptionError("what is to be asked is not clear", where="--cases",
                          found="both --cases and --tasks" if tasks else "neither --cases nor --tasks",
                          expected="one of them", fix="name a file with --cases, or tasks of lm-eval with --tasks")
    ignored = ({"--include-path": include_path, "--limit": limit, "--apply-chat-template": apply_chat_template}
               if cases else {"--judge": judge})
    for option, value in ignored.items():
        if value:
            raise OptionError("an option that would do nothing", where=option, found=value,
                              expected=f"--{'tasks' if cases else 'cases'} beside it", fix=f"leave {option} out")
    if output is not None:
        check_writable(output)

    def find(place: str) -> Answerer:
        return find_model(place, llama=llama, load_in_4bit=load_in_4bit or None, batch_size=batch_size,
                          key_variable=api_key_env)

    found = {name: find(place) for name, place in named_models(models).items()}
    if tasks:
        scores = run_tasks(found, tasks, include_path=include_path, limit=limit, batch_size=batch_size,
                           apply_chat_template=apply_chat_template)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / "tasks.json", scores.to_json())
            write_text(output / "tasks.md", scores.to_markdown())
        _show(scores.to_markdown())
        return
    report = EvaluationPipeline(
        test_cases=str(cases), metrics=[name.strip() for name in metrics.split(",")], models=found,
        judge=None if judge is None else find(judge), max_new_tokens=max_new_tokens, batch_size=batch_size,
        timed_cases=timed_cases).run()
    _show(report.to_markdown())
    if output is not None:
        typer.echo(f"report: {report.save(output) / 'evaluation.html'}")


def _show(text: str) -> None:
    """Markdown, laid out where a terminal reads it, as it is where a program does."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)
