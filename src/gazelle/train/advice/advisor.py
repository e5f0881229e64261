"""`advise` for the log of a run that is over, and `Advisor`, which says the same while it goes on."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazelle.base.log import logger
from gazelle.data.report import DataReport
from gazelle.train.advice.curves import Curves
from gazelle.train.advice.faults import FAULTS
from gazelle.train.advice.findings import Facts, Finding


class Watch:
    """Takes log lines one by one and names each kind of fault once, when it can be told.

    Attributes:
        findings: what was named so far, oldest first.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.curves = Curves()
        self.findings: list[Finding] = []

    def take(self, entry: Mapping[str, Any]) -> list[Finding]:
        """What can be told with this line, and could not before."""
        if not self.curves.take(entry):
            return []
        known = {finding.kind for finding in self.findings}
        new = []
        for kind, fault in FAULTS.items():
            if kind not in known and (said := fault(self.curves, self.facts)) is not None:
                new.append(Finding(kind, self.curves.step, *said))
        self.findings += new
        return new


def advise(entries: Iterable[Mapping[str, Any]], facts: Facts | None = None) -> list[Finding]:
    """What is wrong with a run, going by its log.

    Args:
        entries: lines of `metrics.jsonl` as `read_metrics` gives them, or transformers' `state.log_history`.
        facts: what is known of the run besides; without `max_steps` the last line is taken for the end.

    Returns:
        Findings, one of a kind at most, at the step at which each could first be told.
    """
    lines = list(entries)
    facts = facts or Facts()
    if facts.max_steps is None and lines:
        facts = replace(facts, max_steps=int(max(line.get("step", 0) for line in lines)) or None)
    watch = Watch(facts)
    for line in lines:
        watch.take(line)
    return watch.findings


class Advisor(TrainerCallback):
    """Logs each finding once; its state goes with checkpoints, so that a resumed run says nothing twice.

    Args:
        mode: `SFTConfig.advisor`.
        data: the data report, where there is one.
        ordered: as in `Facts`.
    """

    def __init__(self, mode: str, data: DataReport | None, *, ordered: bool = False) -> None:
        self.mode, self.data, self.ordered = mode, data, ordered
        self.reset()

    def reset(self) -> None:
        """A call of `train` begins."""
        self.watch = Watch(Facts())
        self.stopped: Finding | None = None

    @property
    def findings(self) -> list[Finding]:
        """What was said so far."""
        return self.watch.findings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take down what is known of the run."""
        split = self.data.train if self.data is not None else None
        self.watch.facts = Facts(
            max_steps=state.max_steps, epochs=float(args.num_train_epochs) if args.max_steps <= 0 else None,
            examples=split.examples if split else None, labelled_tokens=split.labelled_tokens if split else None,
            max_grad_norm=args.max_grad_norm or 0.0, schedule=str(getattr(args.lr_scheduler_type, "value", "")),
            ordered=self.ordered or str(args.train_sampling_strategy) == "sequential")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:
        """Say what is new. Every process sees the same figures and decides alike; the first one speaks."""
        if self.mode == "off" or logs is None or self.watch.curves.ended:
            return  # what is evaluated after the last step may be a test set, and says nothing of the run
        for finding in self.watch.take({"step": state.global_step} | logs):
            if state.is_world_process_zero:
                logger.warning("Advice at %s", finding.line())
            if self.mode == "stop" and finding.stops and not self.watch.curves.ended and self.stopped is None:
                self._stop(finding, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The base class takes the stop for the end of an epoch; what it does at one is not wanted."""
        if self.stopped is not None:
            control.should_evaluate = control.should_save = control.should_log = False

    def _stop(self, finding: Finding, state: TrainerState, control: TrainerControl) -> None:
        self.stopped = finding
        control.should_training_stop = True
        # After divergence the last good checkpoint is worth more than one of ruined weights in its place.
        control.should_save = finding.kind != "divergence"
        if state.is_world_process_zero:
            logger.warning("Training stops at step %d of %d: %s (advisor=\"stop\").", state.global_step,
                           state.max_steps, finding.kind)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"curves": self.watch.curves.state_dict(), "findings": [asdict(item) for item in self.findings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint. What was said after it, before rolling back to it, stays said."""
        self.watch.curves.load_state_dict(state["curves"])
        loaded = [Finding(**item) for item in state["findings"]]
        known = {finding.kind for finding in loaded}
        self.watch.findings = loaded + [finding for finding in self.findings if finding.kind not in known]
