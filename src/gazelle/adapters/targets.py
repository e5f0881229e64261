"""Which layers an adapter goes on: names as people write them, mapped to names as the model has them."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from gazelle.base.errors import OptionError, nearest
from gazelle.base.log import logger
from gazelle.quantize.bnb import is_quantized_linear

# A fused projection and its parts. Scripts name whichever their first model had.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"), "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_SYNONYMS = (("o_proj", "dense", "out_proj"), ("up_proj", "fc1"), ("down_proj", "fc2"))


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers but the head, in the model's order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    paths = [path for path, module in model.named_modules() if _is_linear(module) and module is not head]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def resolve_targets(model: nn.Module, wanted: str | Sequence[str] | None) -> str | list[str]:
    """`target_modules` for PEFT. None and "all-linear" mean all linear layers but the head.

    Raises:
        OptionError: a name that matches no layer of the model, under any of its spellings.
    """
    names = linear_names(model)
    if wanted is None or wanted == "all-linear":
        return names
    paths = [name for name, module in model.named_modules() if _is_linear(module) or isinstance(module, nn.Embedding)]
    if isinstance(wanted, str):
        if any(re.fullmatch(wanted, path) for path in paths):
            return wanted
        wanted = [wanted]
    if not wanted:
        raise _unknown("[]", names)
    found: list[str] = []
    for name in wanted:
        matches = [name] if _present(name, paths) else _other_spelling(name, paths)
        if not matches:
            raise _unknown(name, names)
        if matches != [name]:
            logger.info("target_modules: %s is called %s in this model.", name, ", ".join(matches))
        found += matches
    return list(dict.fromkeys(found))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_quantized_linear(module) or type(module).__name__ == "Conv1D"


def _present(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith("." + name) for path in paths)


def _other_spelling(name: str, paths: Sequence[str]) -> list[str]:
    parts = [part for part in _FUSED.get(name, ()) if _present(part, paths)]
    if parts:
        return parts
    wanted = set(_FUSED.get(name, (name,)))
    fused = [whole for whole, inside in _FUSED.items() if wanted <= set(inside) and _present(whole, paths)]
    synonyms = [other for group in _SYNONYMS if name in group for other in group if _present(other, paths)]
    return (fused or synonyms)[:1]


def _unknown(name: str, names: Sequence[str]) -> OptionError:
    return OptionError("no layer of this model has that name", where="target_modules", found=name,
                       expected="names of linear layers: " + ", ".join(names), fix=nearest(name, names))
