"""The optimizer over trained parameters laid end to end, where it treats every number by itself."""

from typing import Any

from torch import nn

from gazelle.engine.flat import FlatParameters
from gazelle.models.swap import add_gradients_in_place

# Optimizers that look at one number at a time. Others (Adafactor, Muon, GaLore, ...) need a parameter's shape.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
               "paged_adamw_32bit", "paged_adamw", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
               "sgd", "rmsprop")
MOST_BYTES = 2 * 2**30  # laying parameters end to end copies them: for adapters, not for whole models


def can_flatten(model: nn.Module, optim: str) -> bool:
    """True if the parameters that are trained can be laid end to end for this optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {(parameter.device.type, parameter.dtype) for parameter in trained}
    return optim in ELEMENTWISE and len(kinds) == 1 and sum(parameter.nbytes for parameter in trained) <= MOST_BYTES


def flatten(model: nn.Module, decayed: list[str],
            weight_decay: float) -> tuple[list[FlatParameters], list[dict[str, Any]]]:
    """The trained parameters as flat buffers, and parameter groups of an optimizer over them.

    Args:
        model: whose trained parameters move.
        decayed: names of parameters that weight decay applies to.
        weight_decay: theirs.
    """
    flats, groups = [], []
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for decay in (True, False):
        members = [parameter for name, parameter in trained if (name in decayed) == decay]
        if members:
            flats.append(FlatParameters(members))
            groups.append({"params": [flats[-1].values], "weight_decay": weight_decay if decay else 0.0})
    return flats, groups


class HeldGradients:
    """Flat buffers in force: clearing gradients fills them with zeros instead of dropping them.

    As a context it holds the buffers it was given before, and lets go of them at the end.

    Args:
        model: whose parameters they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.flats: list[FlatParameters] = []

    def hold(self, flats: list[FlatParameters]) -> None:
        """Put buffers in force; nothing happens for none."""
        self.flats = flats
        for flat in flats:
            flat.attach()
        if flats:
            self.model.zero_grad = self._clear
            add_gradients_in_place(self.model, True)

    def __enter__(self) -> None:
        self.hold(self.flats)

    def __exit__(self, *_: object) -> None:
        self.model.__dict__.pop("zero_grad", None)
        add_gradients_in_place(self.model, False)

    def _clear(self, set_to_none: bool = True) -> None:
        for flat in self.flats:
            flat.grad.zero_()
            flat.values.grad = flat.grad  # a step that was skipped took it away
