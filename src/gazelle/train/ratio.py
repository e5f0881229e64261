"""A share of the layers made again, as `gradient_checkpointing_enable(checkpoint_ratio=…)` asks for it: a view on the
memory plan, which otherwise chooses by itself how many."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.engine.keep import ALL, KEEP, Keep
from gazelle.engine.outline import Batch, Outline
from gazelle.engine.plan import Plan, TooSmallError, make_plan

LIMIT = 2**62


@dataclass(frozen=True)
class Ratio:
    """The share of the layers that are made again, and layers that never are.

    Attributes:
        share: from 0 to 1; of all layers.
        excluded: names or numbers of modules; a part of a layer stands for the layer. Those outside of decoder layers,
            such as "lm_head", are never made again anyway.
    """

    share: float
    excluded: tuple[str | int, ...] = ()


def set_ratio(model: Any, share: float, excluded: Sequence[str | int] = ()) -> None:
    """Note on a model what its trainer is to do.

    Raises:
        OptionError: no share, or a module that the model does not have.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise OptionError("this is no share of the layers", where="checkpoint_ratio", found=repr(share),
                          expected="a number from 0 to 1", fix="0 keeps everything, 1 makes every layer again")
    base = unwrap(model)
    names = [name for name, _ in base.named_modules()]
    count = base.config.get_text_config().num_hidden_layers
    for entry in excluded:
        known = 0 <= entry < count if isinstance(entry, int) else any(
            name == entry or name.endswith(f".{entry}") for name in names)
        if not known:
            raise OptionError("the model has no such module", where="exclude_layers", found=str(entry),
                              expected=f"a number from 0 to {count - 1}, or a name such as model.layers.0 or lm_head",
                              fix="change exclude_layers")
    base.gazelle_ratio = Ratio(float(share), tuple(excluded))


def ratio_of(model: Any) -> Ratio | None:
    """What was asked for; None if the plan is to choose."""
    return getattr(unwrap(model), "gazelle_ratio", None)


def only_these(keep: Keep) -> bool:
    """The choices that a ratio is of."""
    return keep in (KEEP, ALL)


def plan_for(ratio: Ratio, outline: Outline, batch: Batch, budget: int) -> Plan:
    """The plan in which that share of the layers is made again, and the others keep everything.

    Raises:
        TooSmallError: it needs more than the budget.
    """
    layers = len(outline.layers)
    free = [number for number in range(layers) if not _excluded(number, ratio)]
    wanted = min(round(ratio.share * layers), len(free))
    plan = _with_at_least(wanted, outline, batch)
    chosen = set(free[:wanted])
    plan = dataclasses.replace(plan, budget=budget,
                               keeps=tuple(ALL if number in chosen else KEEP for number in range(layers)))
    if plan.peak > budget:
        raise TooSmallError(plan.peak)
    return plan


def _with_at_least(count: int, outline: Outline, batch: Batch) -> Plan:
    """The plan for the largest budget at which that many layers are made again: more are where there is less."""
    def planned(budget: int, allowed: Any = only_these) -> Plan:
        return make_plan(outline, batch, budget, None, host=False, allowed=allowed, streams=False)

    def again(plan: Plan) -> int:
        return sum(keep == ALL for keep in plan.keeps)

    if count == len(outline.layers):
        return planned(LIMIT, lambda keep: keep == ALL)
    low, high = planned(LIMIT, lambda keep: keep == ALL).peak, planned(LIMIT, lambda keep: keep == KEEP).peak
    best = planned(high, lambda keep: keep == KEEP) if count == 0 else planned(low)
    while count and high - low > 1:
        middle = (low + high) // 2
        plan = planned(middle)
        if again(plan) >= count:
            low, best = middle, plan
        else:
            high = middle
    return best


def _excluded(number: int, ratio: Ratio) -> bool:
    return any(entry == number or (isinstance(entry, str) and f".layers.{number}." in f".{entry}.")
               for entry in ratio.excluded)
