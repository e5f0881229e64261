"""What a checkpoint holds besides the model, and how a run takes it up again to the bit.

    optimizer.*, scheduler.json, scaler.json    their own states
    process-0.*                                 of each process: random states, losses since the last log line
    run.*                                       callbacks that have `state_dict` and `load_state_dict`, and trained
                                                parameters that the model's own files leave out
    trainer_state.json                          transformers' own record

No file is a pickle. The order of rows and the packing follow from seed and step, so nothing of them has to be kept.
"""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from gazelle.adapters.unwrap import adapter_state
from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.train.checkpoint import (
    SLACK,
    checkpoints,
    fault,
    find_checkpoint,
    is_foreign,
    recover,
    rotate,
    size_of,
    staged_checkpoint,
)
from gazelle.train.config import optimizer_name
from gazelle.train.setup import check_adapter
from gazelle.train.state_file import check_state, has_state, read_state, write_state


class Checkpoints(TrainerCallback):
    """Saves and restores the state of a trainer.

    Args:
        trainer: the `SFTTrainer`; it calls this at the places where transformers saves and loads.

    Attributes:
        resumed: the checkpoint that the run goes on from.
        written: the last one that it wrote since.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.resumed: Path | None = None
        self.written: Path | None = None

    def find(self, resume: str | Path | bool | None) -> Path | None:
        """The checkpoint to go on from, the same in all processes; what killed runs left behind is cleared away.

        Raises:
            OptionError: there is none that is sound, or it was made with another adapter.
        """
        output_dir = str(self.trainer.args.output_dir)

        def look() -> Path | None:
            recover(Path(output_dir))
            found = find_checkpoint(resume, output_dir)
            check_adapter(found, self.trainer.model)
            return found

        self.resumed, self.written = self.first_alone(look), None
        if self.resumed is not None and is_foreign(self.resumed):
            logger.warning("%s was written by transformers: it has no manifest to verify it by.", self.resumed)
        return self.resumed

    def back(self) -> Path | None:
        """The run's last checkpoint that is sound, once more to go on from."""
        return self.find(True if self.written is not None else self.resumed)

    def save(self, trial: Any) -> None:
        """Write `checkpoint-N` and delete the oldest beyond `save_total_limit`.

        Raises:
            OutputError: in every process, if the first could not write.
        """
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        if trainer.hp_search_backend is None and trial is None:
            trainer.store_flos()
        folder = Path(trainer._get_output_dir(trial))
        target = folder / f"checkpoint-{state.global_step}"
        best = folder / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        if args.save_strategy != SaveStrategy.NO and best is not None and (best == target or best.exists()):
            state.best_model_checkpoint = str(best)
        processes = self._gathered(self._of_this_process())

        def write() -> None:
            with staged_checkpoint(target, self._needed(folder)) as staging:
                trainer.save_model(str(staging), _internal_call=True)
                if not args.save_only_model:
                    self._write(staging, processes)
                self._note_callbacks()
                state.save_to_json(str(staging / "trainer_state.json"))
            rotate(folder, args.save_total_limit, [target] if best is None else [target, best])

        self.first_alone(write)
        self.written = target
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(target))

    def layout(self, folder: Path | None) -> str | None:
        """How the optimizer of a checkpoint saw the parameters: "flat", "parameters", or None if there is no saying."""
        if folder is None:
            return None
        if has_state(folder / "optimizer"):
            return json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["layout"]
        if not (folder / "optimizer.pt").exists():
            return None
        groups = torch.load(folder / "optimizer.pt", map_location="meta", weights_only=True)["param_groups"]
        trained = sum(parameter.requires_grad for parameter in self.trainer.model.parameters())
        return "parameters" if sum(len(group["params"]) for group in groups) == trained else "flat"

    def load_optimizer(self, folder: Path) -> None:
        """Optimizer, scheduler and scaler.

        Raises:
            OptionError: they belong to other parameters or to another optimizer.
        """
        trainer = self.trainer
        if not has_state(folder / "optimizer"):
            raise OptionError("the checkpoint holds a model, but no state of training", where=str(folder),
                              found="save_only_model", expected="an optimizer's state",
                              fix="start anew, with this folder as the model")
        saved = read_state(folder / "optimizer")
        for what, theirs, ours in (("another optimizer", saved["name"], optimizer_name(trainer.args)),
                                   ("other trained parameters", saved["trained"], self._trained()),
                                   ("another layout of the optimizer's state", saved["layout"], self._layout())):
            if theirs != ours:
                raise OptionError(f"the checkpoint has {what}", where=str(folder), found=str(theirs),
                                  expected=str(ours), fix="resume with the settings, and on as many processes as, it "
                                  "was started with, or start anew")
        trainer.optimizer.load_state_dict(saved["state"])
        self._page_out()
        trainer.lr_scheduler.load_state_dict(read_state(folder / "scheduler"))
        if trainer.accelerator.scaler is not None and has_state(folder / "scaler"):
            trainer.accelerator.scaler.load_state_dict(read_state(folder / "scaler"))

    def load_foreign_optimizer(self, load: Callable[[], None]) -> None:
        """What transformers wrote, by its own means, which unpickle tensors and plain containers alone.

        Raises:
            OptionError: it belongs to other parameters, or holds something else.
        """
        try:
            load()
        except (ValueError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
            raise OptionError("the optimizer's state that transformers wrote does not fit this run",
                              where=str(self.resumed), found=str(error).splitlines()[0],
                              expected="the same optimizer over the same parameters",
                              fix="start anew, with this folder as the model or adapter") from error

    def load_random(self, folder: Path) -> None:
        """Random states of this process."""
        if (saved := self._process_state(folder)) is None:
            return
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["torch"])
        if self.trainer.args.device.type == saved["device_type"] != "cpu":
            torch.get_device_module(self.trainer.args.device).set_rng_state(saved["device"])

    def load_callbacks(self) -> None:
        """States that transformers keeps in `trainer_state.json`, put into the callbacks that are there."""
        for name, saved in self.trainer.state.stateful_callbacks.items():
            for callback, entry in zip(self._exportable().get(name, []), saved if isinstance(saved, list) else [saved],
                                       strict=False):
                for attribute, value in entry.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore what the base class has just set anew. This comes after all other callbacks.

        Raises:
            OptionError: a callback has a state that no checkpoint can hold.
        """
        self._check_callbacks()
        folder = self.resumed
        if folder is None or is_foreign(folder):
            return
        trainer = self.trainer
        if (saved := self._process_state(folder)) is not None:
            trainer._tr_loss.fill_(saved["loss"])
            trainer._total_loss_scalar = saved["total_loss"]
            trainer._globalstep_last_logged = saved["last_logged"]
        run = read_state(folder / "run")
        for name, states in run["callbacks"].items():
            callbacks = self._stateful().get(name, [])
            if len(callbacks) != len(states):
                logger.warning("The checkpoint has the state of %d callbacks called %s; there are %d now.", len(states),
                               name, len(callbacks))
            for callback, state in zip(callbacks, states, strict=False):
                callback.load_state_dict(state)
        parameters = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, value in run["parameters"].items():
                parameters[name].copy_(value)

    def _check_callbacks(self) -> None:
        for name, callbacks in self._stateful().items():
            for callback in callbacks:
                try:
                    check_state(callback.state_dict(), f"{name}.state_dict()")
                except TypeError as error:
                    raise OptionError("a callback's state cannot be saved", where=name, found=str(error),
                                      expected="numbers, strings, lists, dictionaries, tensors and arrays",
                                      fix="return only these from its state_dict") from error

    def _write(self, staging: Path, processes: list[Any]) -> None:
        trainer = self.trainer
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()  # paged state is read from the host's side
        write_state(staging / "optimizer", {"name": optimizer_name(trainer.args), "layout": self._layout(),
                                            "trained": self._trained(), "state": trainer.optimizer.state_dict()})
        write_state(staging / "scheduler", trainer.lr_scheduler.state_dict())
        if trainer.accelerator.scaler is not None:
            write_state(staging / "scaler", trainer.accelerator.scaler.state_dict())
        for rank, state in enumerate(processes):
            write_state(staging / f"process-{rank}", state)
        callbacks = {name: [callback.state_dict() for callback in those] for name, those in self._stateful().items()}
        write_state(staging / "run", {"callbacks": callbacks, "parameters": self._left_out()})

    def _left_out(self) -> dict[str, torch.Tensor]:
        """Trained parameters that an adapter's files do not hold, such as norms of the base model set free by hand."""
        model = self.trainer.model
        if not hasattr(model, "peft_config"):
            return {}
        held = {tensor.data_ptr() for tensor in adapter_state(model).values()}
        return {name: parameter.data for name, parameter in model.named_parameters()
                if parameter.requires_grad and parameter.data_ptr() not in held}

    def _of_this_process(self) -> dict[str, Any]:
        trainer = self.trainer
        device = trainer.args.device
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
                "device_type": device.type,
                "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
                "loss": trainer._tr_loss.item(), "total_loss": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged, "processes": trainer.args.world_size}

    def _process_state(self, folder: Path) -> dict[str, Any] | None:
        args = self.trainer.args
        if not has_state(folder / f"process-{args.process_index}"):
            logger.warning("%s has no random states of process %d: the run does not go on to the bit.", folder,
                           args.process_index)
            return None
        saved = read_state(folder / f"process-{args.process_index}")
        if saved["processes"] != args.world_size:
            logger.warning("%s was written by %d processes, now there are %d: the run does not go on to the bit.",
                           folder, saved["processes"], args.world_size)
        return saved

    def _trained(self) -> list[int]:
        """Parameters that are trained, and numbers in them."""
        sizes = [parameter.numel() for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        return [len(sizes), sum(sizes)]

    def _layout(self) -> str:
        return "flat" if self.trainer._held.flats else "parameters"

    def _page_out(self) -> None:
        """A paged optimizer loads its state into the GPU's own memory: put it back into pages."""
        inner = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if not getattr(inner, "is_paged", False):
            return
        for parameter, state in inner.state.items():
            for name in ("state1", "state2"):
                if name in state:
                    page = inner.get_state_buffer(parameter, dtype=state[name].dtype)
                    page.copy_(state[name])
                    state[name] = page

    def _needed(self, folder: Path) -> int:
        """Bytes, going by the last checkpoint or, before there is one, by what is going to be in it."""
        for path in checkpoints(folder)[:1]:
            if fault(path, thorough=False) is None:
                return size_of(path)
        adapted = hasattr(self.trainer.model, "peft_config")
        weights = sum(p.nbytes for p in self.trainer.model.parameters() if p.requires_grad or not adapted)
        state = [value for values in self.trainer.optimizer.state.values() for value in values.values()]
        return SLACK + weights + sum(value.nbytes for value in state if isinstance(value, torch.Tensor))

    def _exportable(self) -> dict[str, list[Any]]:
        return _by_name(item for item in [*self.trainer.callback_handler.callbacks, self.trainer.control]
                        if isinstance(item, ExportableState))

    def _stateful(self) -> dict[str, list[Any]]:
        return _by_name(item for item in self.trainer.callback_handler.callbacks
                        if hasattr(item, "state_dict") and hasattr(item, "load_state_dict"))

    def _note_callbacks(self) -> None:
        states = {name: [item.state() for item in items] for name, items in self._exportable().items()}
        self.trainer.state.stateful_callbacks = {name: them[0] if len(them) == 1 else them
                                                 for name, them in states.items()}

    def _gathered(self, mine: Any) -> list[Any]:
        if self.trainer.args.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.trainer.args.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def first_alone(self, work: Any) -> Any:
        """What the first process makes of `work`, its error included, in all of them."""
        if self.trainer.args.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.trainer.args.should_save:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001 — raised below, here and in the others, which would wait
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _by_name(items: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(type(item).__name__, []).append(item)
    return found
