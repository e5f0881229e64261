"""What scripts ask of a GPU, on a machine that has none: `.to("cuda")`, `.cuda()`, `device_map="cuda"`, its memory.

Somebody who runs such a script on a CPU wants it to run there. While `cuda_is_cpu` lasts, a place on a GPU means the
CPU, and one line in the log says so. Nothing changes where there is a GPU.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gazelle.base.device import device_name, memory_in_use, peak_memory, total_memory
from gazelle.base.exchange import exchange
from gazelle.base.log import say_once
from gazelle.models import options

_NOTHING = ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "reset_max_memory_allocated",
            "ipc_collect", "manual_seed", "manual_seed_all")


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Take a CPU where a script says "cuda"; nothing where torch has a GPU."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        exchange(stack, torch.Tensor, "to", _moved)
        exchange(stack, torch.Tensor, "cuda", _on_cpu)
        exchange(stack, torch.nn.Module, "cuda", _on_cpu)
        exchange(stack, options, "device_map", _mapped)
        for name, answer in _answers().items():
            exchange(stack, torch.cuda, name, functools.partial(_instead, answer))
        yield


def _instead(answer: Callable[..., Any], _: Any) -> Any:
    return answer


def _place(device: Any) -> Any:
    """The CPU for a GPU; anything else as it is."""
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if kind == "cuda" and isinstance(device, str | torch.device):
        say_once('there is no GPU here: what goes to "cuda" stays on the CPU')
        return torch.device("cpu")
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


def _on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def cuda(self: Any, *_: Any, **__: Any) -> Any:
        _place("cuda")
        return self

    return cuda


def _answers() -> dict[str, Callable[..., Any]]:
    """What is asked of a GPU's memory and kind, answered for the CPU: in bytes of this process and machine."""
    def properties(*_: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=device_name("cpu"), total_memory=total_memory("cpu"), major=0, minor=0,
                                     multi_processor_count=torch.get_num_threads())

    in_use = dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: memory_in_use("cpu"))
    peak = dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: peak_memory("cpu"))
    return {**in_use, **peak, **dict.fromkeys(_NOTHING, lambda *_, **__: None), "get_device_properties": properties,
            "get_device_name": lambda *_: device_name("cpu"), "get_device_capability": lambda *_: (0, 0),
            "current_device": lambda: 0}
