"""What the report says of a run besides metrics, data and samples."""

from dataclasses import dataclass
from typing import Any

from gazelle.base.device import peak_memory
from gazelle.train.advice.findings import Finding


@dataclass(frozen=True)
class RunFacts:
    """Times in seconds, memory in bytes. `plan` is (what, said) of the memory plan and of what befell the run.

    `advice` is what the advisor said, and `stopped` the kind of what it stopped the run for; empty if it did not.
    """

    model_name: str
    trainable: int
    parameters: int
    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    plan: list[tuple[str, str]]
    adapter: dict[str, Any] | None
    advice: list[Finding]
    stopped: str


def run_facts(trainer: Any) -> RunFacts:
    """The facts of an `SFTTrainer` whose training is over."""
    model = trainer.model
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    adapter = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", "default"))
    chosen = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    return RunFacts(
        model_name=model.config.name_or_path,
        trainable=sum(size for size, trains in sizes if trains),
        parameters=sum(size for size, _ in sizes),
        steps=trainer.state.global_step, seconds=trainer.seconds, tokens=trainer.tokens,
        tokens_per_second=trainer.tokens / max(trainer.seconds - trainer.evaluating, 1e-9),
        peak_memory=peak_memory(str(trainer.args.device)),
        plan=plan_lines(trainer),
        adapter=adapter and {name: getattr(adapter, name) for name in chosen if hasattr(adapter, name)},
        advice=trainer._advisor.findings, stopped=trainer._advisor.stopped.kind if trainer._advisor.stopped else "",
    )


def plan_lines(trainer: Any) -> list[tuple[str, str]]:
    """The memory plan beside what was measured, and the steps that were skipped."""
    lines = [] if trainer.plan is None else trainer.plan.lines()
    counts = trainer._spikes.counts
    if counts:
        said = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        lines.append(("skipped steps", f"{said}; the last: {trainer._spikes.last}"))
    return lines
