"""`SurvivingTrainer`: transformers' trainer with checkpoints that are whole or not there, and an end that can wait."""

import contextlib
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from gazelle.base.lock import folder_lock
from gazelle.base.log import logger
from gazelle.data.report import DataReport
from gazelle.train.advice.advisor import Advisor
from gazelle.train.checkpoint import fault, find_checkpoint, is_foreign
from gazelle.train.config import SFTConfig
from gazelle.train.interrupt import Interrupted, Interruption
from gazelle.train.metrics import MetricsFile
from gazelle.train.optimizer import HeldGradients
from gazelle.train.saving import Checkpoints
from gazelle.train.spikes import RollBack, Spikes


class SurvivingTrainer(Trainer):
    """What `SFTTrainer` builds on; `guard` sets it up once the base class has been."""

    ordered = False  # rows come from easy to hard

    def guard(self, config: SFTConfig, data: DataReport | None) -> None:
        """Add the callbacks that watch signals, spikes and curves, and what saves and restores."""
        self._held = HeldGradients(self.model)
        self._metrics = MetricsFile()
        self._checkpoints = Checkpoints(self)
        self._interruption = Interruption()
        self._spikes = Spikes(config.on_spike, config.spike_factor, "fp16" if config.fp16 else config.precision,
                              self.args.device, lambda: bool(self._held.flats) and self.accelerator.scaler is None,
                              lambda: self._checkpoints.written or self._checkpoints.resumed)
        self._advisor = Advisor(config.advisor, data, ordered=self.ordered)
        for callback in (self._metrics, self._spikes, self._advisor, self._interruption, self._checkpoints):
            self.add_callback(callback)

    @contextlib.contextmanager
    def taken_up(self, resume: str | Path | bool | None) -> Iterator[Path | None]:
        """While it lasts, the output folder is this run's alone. Gives the checkpoint to go on from.

        Raises:
            OutputError: another run has the folder.
            OptionError: no checkpoint to go on from is sound.
        """
        folder = Path(str(self.args.output_dir))
        with contextlib.ExitStack() as stack:
            def take() -> None:
                if resume is True and not folder.exists():
                    find_checkpoint(True, str(folder))  # says so before the lock makes the folder
                stack.enter_context(folder_lock(folder))

            self._checkpoints.first_alone(take)
            yield self._checkpoints.find(resume)

    def train_on(self, resume: Path | None, **kwargs: Any) -> Any:
        """The base class's training, taken up from the last checkpoint whenever a spike asks for it.

        Raises:
            Interrupted: a signal came; a checkpoint has been saved.
        """
        self._spikes.reset()
        self._advisor.reset()
        with self._interruption.watching(self.args.world_size):
            while True:
                self.remove_callback(self._checkpoints)
                self.add_callback(self._checkpoints)  # behind all others, whose states it restores once they have begun
                try:
                    result = super().train(None if resume is None else str(resume), **kwargs)
                    break
                except RollBack:
                    resume = self._checkpoints.back()
                self.rolled_back()
        if self._interruption.caught is not None and not self._interruption.stopping:
            signal.raise_signal(self._interruption.caught)  # too late to stop anything here: as it would be without us
        elif self._interruption.caught is not None:
            logger.warning("Stopped at step %d of %d, saved in %s. To go on: trainer.train(resume_from_checkpoint=True)"
                           " or gazelle train RECIPE --resume.", self.state.global_step, self.state.max_steps,
                           self._checkpoints.written)
            raise Interrupted(self._interruption.caught)
        return result

    def rolled_back(self) -> None:
        """Training is about to go on from an earlier step."""
        self._metrics.begun = False  # lines after that step are dropped

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the base class would look only after one step more
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._checkpoints.save(trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_foreign(Path(checkpoint)):
            self._checkpoints.load_foreign_optimizer(partial(super()._load_optimizer_and_scheduler, checkpoint))
        elif checkpoint is not None:
            self._checkpoints.load_optimizer(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_foreign(Path(checkpoint)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_foreign(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            self._checkpoints.load_random(Path(checkpoint))

    def _load_callback_state(self) -> None:
        self._checkpoints.load_callbacks()

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self._interruption.stopping:
            return
        if reason := fault(best):
            logger.warning("The best model is not loaded, as %s is damaged: %s. The last weights stay.", best, reason)
            return
        super()._load_best_model()
