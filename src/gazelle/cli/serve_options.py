"""Options of `gazelle serve` and `gazelle serve-key`, which `cli.app` puts among the commands."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder that training wrote, any checkpoint, or a GGUF file.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model. Default: the folder's name.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: another adapter of the same base. Repeat it for several.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of keys that requests have to bring; see `gazelle serve-key`.")
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Serve other machines without asking for a key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name that requests may call the server by. Repeat it for several.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Answers written at a time, as one batch.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; beyond them, 429.")] = 64,
    max_context: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer. Default: the context.")] = None,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MiB",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request, waiting included.")] = 300.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of requests that state none.")] = 1.0,
    guard: Annotated[
        Path | None, typer.Option(help="YAML file with SafetyChecker's options, for what is asked and answered.")
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="4-bit weights. Default: as in training, else as they are stored.")
    ] = False,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Print vLLM's command instead, and when to move there.")
    ] = False,
    dashboard: Annotated[
        Path | None, typer.Option(help="Write a Grafana dashboard and Prometheus alert rules to this folder instead.")
    ] = None,
) -> None:
    """Serve a model, and adapters on it, as OpenAI's API."""
    from gazelle.cli.serve import fleet_command, monitoring_command, serve_command

    if dashboard is not None:
        monitoring_command(dashboard)
        return
    if model is None:
        raise typer.BadParameter("which model?", param_hint="MODEL")
    if fleet:
        fleet_command(model)
        return
    serve_command(model, name=name, adapters=adapter or [], host=host, port=port, api_keys=api_keys,
                  without_keys=without_keys, allowed_hosts=allowed_host or [], max_running=max_running,
                  max_queue=max_queue, max_context=max_context, max_tokens=max_tokens, max_body=max_body,
                  timeout=timeout, temperature=temperature, guard=guard, load_in_4bit=load_in_4bit)


def serve_key(
    name: Annotated[str, typer.Argument(help="Whose key; metrics count by it.")],
    file: Annotated[Path, typer.Option(help="File of hashes, made if need be.")] = Path("keys.json"),
    revoke: Annotated[bool, typer.Option("--revoke", help="Take the key out instead.")] = False,
) -> None:
    """Make an API key for `gazelle serve`, and print it once."""
    from gazelle.cli.serve import key_command

    key_command(name, file, revoke=revoke)
