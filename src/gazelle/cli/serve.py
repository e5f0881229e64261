"""`gazelle serve` and `gazelle serve-key`."""

import gc
from collections.abc import Sequence
from pathlib import Path

import typer

from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.base.optional import require
from gazelle.base.sizes import parse_bytes


def serve_command(
    model: str, *, name: str | None, adapters: Sequence[str], host: str, port: int, api_keys: Path | None,
    without_keys: bool, allowed_hosts: Sequence[str], max_running: int, max_queue: int, max_context: int | None,
    max_tokens: int | None, max_body: str, timeout: float, temperature: float, guard: Path | None,
    load_in_4bit: bool,
) -> None:
    """Check what was asked for, load the model, and serve until a signal comes."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package)
    from gazelle.serve.keys import read_keys
    from gazelle.serve.loading import load_guard, load_service
    from gazelle.serve.server import listen, make_server
    from gazelle.serve.settings import Limits, Settings, check_exposed

    limits = Limits(running=max_running, queue=max_queue, body_bytes=parse_bytes(max_body, "--max-body"),
                    seconds=timeout, answer_tokens=max_tokens)
    settings = Settings(host, port, tuple(host.lower() for host in allowed_hosts), temperature, limits)
    keys = read_keys(api_keys) if api_keys is not None else None
    check_exposed(settings, keys=keys is not None, allowed=without_keys)
    places = dict(_named(adapter) for adapter in adapters)
    checker = load_guard(guard)
    bound = listen(settings)
    try:
        service = load_service(model, places, settings, name=name, max_context=max_context, guard=checker,
                               load_in_4bit=load_in_4bit, keys=keys.names if keys else ())
    except BaseException:
        bound.close()
        raise
    address, shown = bound.getsockname()[:2], f"[{host.strip('[]')}]" if ":" in host else host

    def ready() -> None:
        logger.info("Serving %s at http://%s:%d/v1, metrics at /metrics. Ctrl-C ends it.",
                    ", ".join(service.models), shown, address[1])
        logger.info("For a fleet of machines: gazelle serve %s --fleet", model)

    gc.freeze()  # what is loaded stays: no search for garbage need look through it while requests wait
    try:
        make_server(service, keys, ready).run(sockets=[bound])
    finally:
        gc.unfreeze()
        service.close()
        bound.close()


def fleet_command(model: str) -> None:
    """Print when a fleet is needed, and the command that vLLM serves the model with."""
    from gazelle.facade.fleet import fleet_advice

    typer.echo(fleet_advice(model))


def monitoring_command(folder: Path) -> None:
    """Write the dashboard for Grafana and the alert rules for Prometheus."""
    from gazelle.serve.monitoring import write_monitoring

    for path in write_monitoring(folder):
        typer.echo(path)


def key_command(name: str, file: Path, *, revoke: bool) -> None:
    """Make a key and print it, this once, or take one out of the file."""
    from gazelle.serve.keys import add_key, revoke_key

    if revoke:
        revoke_key(file, name)
        typer.echo(f"{name} is revoked; a server that runs knows it until it is started anew.", err=True)
        return
    key = add_key(file, name)
    typer.echo(f"The key of {name}. It is shown this once; {file} holds its hash.", err=True)
    typer.echo(key)


def _named(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (found and name and path):
        raise OptionError("an adapter needs a name for requests to ask for", where="--adapter", found=text,
                          expected="NAME=PATH", fix=f"write --adapter {Path(text).name or 'mine'}={text}")
    return name, path
