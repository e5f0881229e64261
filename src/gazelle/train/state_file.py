"""Nested state (dictionaries, lists, numbers, tensors) as JSON beside safetensors: nothing is ever unpickled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gazelle.base.files import make_readable


def write_state(stem: Path, state: Any) -> None:
    """Write `state` to `stem`.json, and the tensors in it, if any, to `stem`.safetensors.

    Args:
        stem: path without suffix.
        state: dictionaries, lists, tuples, numbers, strings, None, tensors and NumPy arrays, in each other.

    Raises:
        TypeError: naming what in it is none of these.
    """
    tensors: dict[str, Tensor] = {}
    tree = _plain(state, tensors, stem.name, set())
    if tensors:
        path = stem.with_name(stem.name + ".safetensors")
        save_file(tensors, path)
        make_readable(path)
    stem.with_name(stem.name + ".json").write_text(json.dumps(tree), encoding="utf-8")


def check_state(state: Any, name: str) -> None:
    """Raise `TypeError` if `write_state` could not write `state`; `name` is what it is called in the message."""
    _plain(state, {}, name, set())


def read_state(stem: Path) -> Any:
    """What `write_state` was given, to the bit; tensors are on the CPU."""
    file = stem.with_name(stem.name + ".safetensors")
    tensors = load_file(file) if file.exists() else {}
    return _rebuilt(json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8")), tensors)


def has_state(stem: Path) -> bool:
    """True if there is such a state."""
    return stem.with_name(stem.name + ".json").exists()


def _plain(value: Any, tensors: dict[str, Tensor], name: str, storages: set[int]) -> Any:
    """`value` as JSON takes it; what JSON does not know is an object with one key that begins with $."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        tensor = value.detach().contiguous() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
        return {"$tensor" if isinstance(value, Tensor) else "$array": name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _plain(item, tensors, f"{name}.{key}", storages) for key, item in value.items()}
        return {"$dict": [[_plain(key, tensors, f"{name} (key)", storages),
                           _plain(item, tensors, f"{name}.{key}", storages)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_plain(item, tensors, f"{name}.{number}", storages) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _rebuilt(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_rebuilt(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind, content = next(iter(tree.items()), ("", None))  # type: tuple[str, Any]
    if kind == "$tensor":
        return tensors[content]
    if kind == "$array":
        return tensors[content].numpy()
    if kind == "$tuple":
        return tuple(_rebuilt(item, tensors) for item in content)
    if kind == "$dict":
        return {_rebuilt(key, tensors): _rebuilt(item, tensors) for key, item in content}
    return {key: _rebuilt(item, tensors) for key, item in tree.items()}
