"""The optimizer over trained parameters laid end to end, where it treats every number by itself."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.base.errors import OptionError
from gazelle.engine.flat import FlatParameters
from gazelle.models.swap import add_gradients_in_place
from gazelle.train.config import SFTConfig

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


def learning_rates(model: nn.Module, args: SFTConfig) -> dict[str, float]:
    """Parameters that are trained at another rate than `learning_rate`, by name.

    Embedding and head, whole or by the rows of new tokens, at `embedding_learning_rate`; the factors B of LoRA at
    `loraplus_lr_ratio` times the rate of A (LoRA+, https://arxiv.org/abs/2402.12354).

    Raises:
        OptionError: one of them is given and nothing is trained that it applies to.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ends = [name for name in trained if {"embed_tokens", "lm_head"} & set(name.split("."))]
    rates: dict[str, float] = {}
    for option, names, rate in (
        ("loraplus_lr_ratio", [name for name in trained if {"lora_B", "lora_embedding_B"} & set(name.split("."))],
         args.learning_rate * (args.loraplus_lr_ratio or 0)),
        ("embedding_learning_rate", ends, args.embedding_learning_rate or 0),
    ):
        if getattr(args, option, None) is None:
            continue
        if not names:
            raise OptionError("a learning rate for what is not trained", where=option, found=str(getattr(args, option)),
                              expected="an adapter of LoRA" if option == "loraplus_lr_ratio" else
                              'target_modules or modules_to_save with "embed_tokens" or "lm_head", or new tokens',
                              fix=f"leave {option} out, or train it")
        rates |= dict.fromkeys(names, rate)
    return rates


def grouped(model: nn.Module, decayed: Collection[str], weight_decay: float,
            rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimizer: with and without weight decay, a group for each rate.

    Args:
        model: whose parameters they are.
        decayed: names of parameters that weight decay applies to.
        weight_decay: theirs.
        rates: parameters with a learning rate of their own; the others get the optimizer's, and come first.
    """
    members: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((rates.get(name), name in decayed), []).append(parameter)
    order = sorted(members, key=lambda key: (key[0] is not None, key[0] or 0.0, not key[1]))
    return [{"params": members[rate, decay], "weight_decay": weight_decay if decay else 0.0}
            | ({} if rate is None else {"lr": rate}) for rate, decay in order]


def flatten(groups: Iterable[dict[str, Any]]) -> tuple[list[FlatParameters], list[dict[str, Any]]]:
    """The parameters of each group in one flat buffer, and the groups over these buffers."""
    groups = list(groups)
    flats = [FlatParameters(group["params"]) for group in groups]
    return flats, [group | {"params": [flat.values]} for group, flat in zip(groups, flats, strict=True)]


def clip_finite(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, but gradients whose norm is no number stay as they are: one can still see
    which of them are not finite, without having looked at all of them before.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.where(norm.isfinite(), norm, 0.0))
    return norm


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
