"""What the advisor says, and what it has to know of a run besides its curves."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["divergence", "spike", "overfitting", "too little data", "loss near zero", "plateau", "underfitting"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Where going on is useless: the weights are ruined, get worse on rows that are not trained on, or stay as they are.
STOPPING: tuple[Kind, ...] = ("divergence", "overfitting", "loss near zero")


@dataclass(frozen=True)
class Finding:
    """A fault, at the step at which it could be told.

    Attributes:
        seen: what the curves show, in figures.
        remedy: what to do, with options and values.
    """

    kind: Kind
    step: int
    seen: str
    remedy: str

    @property
    def stops(self) -> bool:
        """Going on would be useless."""
        return self.kind in STOPPING

    def line(self) -> str:
        """All of it as a sentence or two."""
        return f"step {self.step}, {self.kind}: {self.seen}. To do: {self.remedy}."


@dataclass(frozen=True)
class Facts:
    """Settings and data of a run, as far as they are known.

    Attributes:
        max_steps: optimizer steps of the whole run.
        epochs: passes over the data in the whole run.
        examples, labelled_tokens: of the training rows.
        max_grad_norm: what gradients are clipped to; 0 for not at all.
        schedule: `lr_scheduler_type`.
        ordered: rows come from easy to hard, or as they are in the file, so that the loss may rise for that reason.
    """

    max_steps: int | None = None
    epochs: float | None = None
    examples: int | None = None
    labelled_tokens: int | None = None
    max_grad_norm: float = 1.0
    schedule: str | None = None
    ordered: bool = False
