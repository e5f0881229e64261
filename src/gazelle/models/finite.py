"""Weights that are not numbers, looked for while they are quantised: afterwards they are gone from sight."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Sums of tensors, which stay on their device: one look at all of them is one wait."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Note a tensor."""
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta:
            self._sums.append(tensor.sum(dtype=torch.float32))

    def finite(self) -> bool:
        """False if a tensor holds NaN or infinity, or finite numbers whose sum overflowed."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for found in self._sums:
            by_device.setdefault(found.device, []).append(found)
        return all(bool(torch.stack(sums).isfinite().all()) for sums in by_device.values())


@contextlib.contextmanager
def summed_while_quantised() -> Iterator[Sums]:
    """While it lasts, bitsandbytes' quantizers of transformers note each tensor in the sums before they quantise it."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    sums = Sums()
    before = {name: AUTO_QUANTIZER_MAPPING[name] for name in ("bitsandbytes_4bit", "bitsandbytes_8bit")}
    AUTO_QUANTIZER_MAPPING.update({name: _noting(kind, sums) for name, kind in before.items()})
    try:
        yield sums
    finally:
        AUTO_QUANTIZER_MAPPING.update(before)


def _noting(kind: Any, sums: Sums) -> Any:
    class Noting(kind):
        def get_quantize_ops(self) -> Any:
            inner = super().get_quantize_ops()
            convert = inner.convert

            def noted(input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                for value in input_dict.values():
                    for tensor in value if isinstance(value, list) else [value]:
                        sums.add(tensor)
                return convert(input_dict, *args, **kwargs)

            inner.convert = noted
            return inner

    Noting.__name__, Noting.__qualname__ = kind.__name__, kind.__qualname__
    return Noting
