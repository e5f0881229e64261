"""What scripts ask of a GPU, on a machine that has none: `.to("cuda")`, `.cuda()`, `device_map="cuda"`, its memory.

Somebody who runs such a script there wants it to run on what there is. While `cuda_is_here` lasts, "cuda" means the
device that gazelle would choose, and one line in the log says so. Nothing changes where torch has "cuda".
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gazelle.base.device import default_device, device_name, memory_in_use, peak_memory, total_memory
from gazelle.base.exchange import exchange
from gazelle.base.log import say_once
from gazelle.models import options

_NOTHING = ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "reset_max_memory_allocated",
            "ipc_collect", "manual_seed", "manual_seed_all")


@contextlib.contextmanager
def cuda_is_here() -> Iterator[None]:
    """Take the device that is there where a script says "cuda"."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        exchange(stack, torch.Tensor, "to", _moved)
        for kind in (torch.Tensor, torch.nn.Module):
            exchange(stack, kind, "cuda", lambda _: _moved_here)
        exchange(stack, options, "device_map", _mapped)
        for name, answer in _answers().items():
            exchange(stack, torch.cuda, name, functools.partial(_instead, answer))
        yield


def _instead(answer: Callable[..., Any], _: Any) -> Any:
    return answer


def _place(device: Any) -> Any:
    """The device that is there for "cuda"; anything else as it is."""
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if kind == "cuda" and isinstance(device, str | torch.device):
        say_once(f'there is no "cuda" here: what is sent there goes to {default_device()}')
        return torch.device(default_device())
    return device


def _mapped(original: Any) -> Any:
    @functools.wraps(original)
    def device_map(place: Any) -> Any:
        if isinstance(place, dict):
            place = {part: _place(f"cuda:{device}" if isinstance(device, int) else device)
                     for part, device in place.items()}
        return original(_place(place))

    return device_map


def _moved(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str | torch.device):
            args = (_place(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _place(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


def _moved_here(self: Any, *_: Any, **__: Any) -> Any:
    """In place of `.cuda()`."""
    return self.to(_place("cuda"))


def _answers() -> dict[str, Callable[..., Any]]:
    """What is asked of a GPU's memory and kind, answered for the device that is there, in bytes."""
    here = default_device()

    def properties(*_: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=device_name(here), total_memory=total_memory(here), major=0, minor=0,
                                     multi_processor_count=torch.get_num_threads())

    in_use = dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: memory_in_use(here))
    peak = dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: peak_memory(here))
    return {**in_use, **peak, **dict.fromkeys(_NOTHING, lambda *_, **__: None), "get_device_properties": properties,
            "get_device_name": lambda *_: device_name(here), "get_device_capability": lambda *_: (0, 0),
            "current_device": lambda: 0}
