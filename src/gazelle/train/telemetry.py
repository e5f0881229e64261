"""Metrics of a run for Prometheus, while it trains, on the loopback address."""

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.base.optional import require
from gazelle.train.metrics import is_eval_loss

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

HOST = "127.0.0.1"
# What a log entry holds, and what it is called for Prometheus.
LOGGED = {
    "loss": ("gazelle_train_loss", "Mean loss a labelled token since the last log line."),
    "grad_norm": ("gazelle_train_grad_norm", "Norm of the gradient before clipping."),
    "learning_rate": ("gazelle_train_learning_rate", "Learning rate."),
    "epoch": ("gazelle_train_epoch", "Epochs so far."),
    "tokens_per_second": ("gazelle_train_tokens_per_second", "Tokens trained a second since the last log line."),
}


class Telemetry(TrainerCallback):
    """Keeps the gauges of one run."""

    def __init__(self, registry: "CollectorRegistry") -> None:
        from prometheus_client import Gauge

        self._logged = {name: Gauge(*named, registry=registry) for name, named in LOGGED.items()}
        self._eval_loss = Gauge("gazelle_train_eval_loss", "Loss of evaluation rows.", ["rows"], registry=registry)
        self._step = Gauge("gazelle_train_step", "Optimizer steps done.", registry=registry)
        self._steps = Gauge("gazelle_train_steps_planned", "Optimizer steps of the run.", registry=registry)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **kwargs: Any) -> None:
        """Say how many steps there will be."""
        self._steps.set(state.max_steps)
        self._step.set(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    **kwargs: Any) -> None:
        """Count the step."""
        self._step.set(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Take what is logged."""
        for name, value in (logs or {}).items():
            if name in self._logged:
                self._logged[name].set(float(value))
            elif is_eval_loss(name):
                self._eval_loss.labels(name.removeprefix("eval_").removesuffix("loss").strip("_") or "all").set(value)


@contextlib.contextmanager
def metrics_served(trainer: Any, port: int | None) -> Iterator[None]:
    """Serve the metrics of `trainer` at `port` until the block ends; of several processes, the first one's.

    Raises:
        OptionError: the port cannot be had.
        MissingDependencyError: without prometheus-client.
    """
    if port is None or not trainer.is_world_process_zero():
        yield
        return
    require("prometheus_client")
    from prometheus_client import start_http_server

    from gazelle.base.metrics import new_registry

    registry = new_registry()
    telemetry = Telemetry(registry)
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise _taken(port, error) from error
    logger.info("Metrics: http://%s:%d/metrics", HOST, server.server_address[1])
    trainer.add_callback(telemetry)
    try:
        yield
    finally:
        trainer.remove_callback(telemetry)
        server.shutdown()
        server.server_close()
        thread.join()


def check_port(port: Any) -> None:
    """Find out, before a model is loaded, that metrics cannot be served.

    Raises:
        OptionError: the port is taken, or is no port.
        MissingDependencyError: without prometheus-client.
    """
    require("prometheus_client")
    if type(port) is not int or not 0 <= port <= 65535:
        raise OptionError("this is no port", where="metrics_port", found=repr(port),
                          expected="a port, or 0 for any that is free", fix="correct it, or leave it out")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise _taken(port, error) from error


def _taken(port: int, error: OSError) -> OptionError:
    return OptionError("metrics cannot be served there", where="metrics_port", found=f"{port}: {error.strerror}",
                       expected="a free port", fix="choose another port")
