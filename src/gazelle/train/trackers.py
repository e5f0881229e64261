"""TensorBoard, W&B, MLflow and Trackio: transformers' callbacks write; here they are told of one run and no more.

A run that is resumed goes on as the same one. `tracking.json` in the output folder says by which names it is known.
"""

import contextlib
import functools
import json
import netrc
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gazelle.base.errors import OptionError
from gazelle.base.files import write_text
from gazelle.base.log import say_once
from gazelle.base.optional import OPTIONAL, require

# What these packages would otherwise send of their own accord; read when they are imported.
_SILENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "GRADIO_ANALYTICS_ENABLED": "False"}
_RECORD = "tracking.json"


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raise `OptionError` (`MissingDependencyError` for a package) for a tracker that cannot be reported to."""
    from transformers.integrations import get_available_reporting_integrations

    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not set(names) <= {"none"}:
        for variable, value in _SILENT.items():
            os.environ.setdefault(variable, value)
    for name in names:
        if name in OPTIONAL:
            require(name)
        elif name not in ("none", "all") and name not in get_available_reporting_integrations():
            raise OptionError("no such place to report to, or its package is not installed", where="report_to",
                              found=name, expected="none, all, tensorboard, wandb, mlflow, trackio, or another that "
                              "transformers knows", fix=f"pip install {name}, or report_to: none")
    if {"wandb", "all"} & set(names) and "WANDB_MODE" not in os.environ and not _logged_in():
        say_once("W&B has no key on this machine: the run is kept offline, for `wandb sync`")
        os.environ["WANDB_MODE"] = "offline"


@contextlib.contextmanager
def tracked(trainer: Any, resume: Path | None) -> Iterator[None]:
    """While it lasts, trackers are told by which name the run is known, and what the memory plan says.

    Args:
        trainer: an `SFTTrainer` that is about to train.
        resume: the checkpoint that it goes on from.
    """
    callbacks = {type(callback).__name__: callback for callback in trainer.callback_handler.callbacks}
    kinds = {"TensorBoardCallback", "WandbCallback", "MLflowCallback", "TrackioCallback"} & callbacks.keys()
    if not kinds or not trainer.is_world_process_zero():
        yield
        return
    args = trainer.args
    folder = Path(str(args.output_dir))
    record = _read(folder) if resume is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    record.setdefault("id", secrets.token_hex(4))
    chosen = args.run_name if args.run_name != args.tracked_name else None
    # Trackio goes on with a run of the same name, so that a new run needs a new one.
    record["name"] = chosen or record.get("name") or f"{folder.resolve().name}-{record['id']}"
    args.run_name = args.tracked_name = record["name"]
    args.tracked_facts = {} if trainer.plan is None else {f"plan/{what}": said for what, said in trainer.plan.lines()}
    variables = {"WANDB_RUN_ID": record["id"], "WANDB_RESUME": "allow"}
    if "mlflow" in record:
        variables["MLFLOW_RUN_ID"] = record["mlflow"]
    if "TensorBoardCallback" in kinds:
        _go_on_with_events(callbacks["TensorBoardCallback"], folder / "runs" / record["name"], resume)
    write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if earlier[name] is None})
    if "MLflowCallback" in kinds:
        _note_mlflow(callbacks["MLflowCallback"], folder, record)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)


def _go_on_with_events(callback: Any, folder: Path, resume: Path | None) -> None:
    """One folder of events a run; what was logged behind the checkpoint is taken back."""
    callback.logging_dir = callback.logging_dir or str(folder)
    writer = callback._SummaryWriter
    if resume is not None and isinstance(writer, type):
        step = json.loads((resume / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        callback._SummaryWriter = functools.partial(writer, purge_step=step + 1)


def _note_mlflow(callback: Any, folder: Path, record: dict[str, str]) -> None:
    """MLflow chooses the name of a run by itself: it is written down once the run has begun."""
    begin = type(callback).setup

    def setup(*arguments: Any, **options: Any) -> None:
        begin(callback, *arguments, **options)
        if active := sys.modules["mlflow"].active_run():
            write_text(folder / _RECORD, json.dumps(record | {"mlflow": active.info.run_id}, indent=1) + "\n")

    callback.setup = setup
    callback._initialized = False  # an earlier call of train() has ended its run


def _read(folder: Path) -> dict[str, str]:
    path = folder / _RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    files = [os.environ.get("NETRC"), *(Path.home() / name for name in (".netrc", "_netrc"))]
    try:
        known = netrc.netrc(next(str(file) for file in files if file and Path(file).exists())).hosts
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    return host in known
