"""One GGUF file on its way to disk: everything in it is announced first, then tensors are written as they come."""

import contextlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from gazelle.base.errors import ModelError, OutputError
from gazelle.base.files import free_bytes
from gazelle.export.gguf_recipe import Recipe
from gazelle.quantize.gguf import KINDS, quantize

Fields = dict[str, Any]
_CHUNK = 1 << 22  # values quantised at a time: what a quantiser needs besides its input and output stays small
_LARGEST_HALF = 65504.0


class GgufOutput:
    """Writes `path`. The order is: `announce` for each tensor, `begin`, `write` for each in the same order, `close`.

    Raises:
        OutputError: from `begin`, `write` and `close`, when the disk refuses.
    """

    def __init__(self, path: Path, architecture: str, fields: Fields) -> None:
        import gguf

        self.path = path
        self.size = 0  # bytes of tensors announced
        self._kinds: dict[str, str] = {}
        self._writer = gguf.GGUFWriter(path, architecture)
        for key, value in fields.items():
            if value == []:  # which a file cannot hold, and does not need
                continue
            self._writer.add_key_value(key, value, _type_of(value))

    def announce(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        """Tell of a tensor of `shape`, slowest dimension first, in ggml's format `kind`."""
        import gguf
        import numpy as np

        bytes_ = KINDS[kind].row(prod(shape))
        self._writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_,
                                     raw_dtype=gguf.GGMLQuantizationType(KINDS[kind].value))
        self._kinds[name] = kind
        self.size += bytes_ + -bytes_ % 32

    def begin(self) -> None:
        """Write metadata and the table of tensors."""
        with self._writing():
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()

    def write(self, name: str, weight: Tensor, importance: Tensor | None = None) -> None:
        """Quantise and write the next tensor, which is in float32 on the CPU; `importance` has a number a column."""
        import torch

        kind = self._kinds[name]
        if kind == "f16" and float(weight.abs().max()) > _LARGEST_HALF:
            raise ModelError("a weight is too large for float16", where=name, found=f"{float(weight.abs().max()):g}",
                             expected=f"at most {_LARGEST_HALF:g}", fix='use quantization_method="bf16" or "q8_0"')
        rows = weight.reshape(-1, weight.shape[-1])
        step = max(1, _CHUNK // rows.shape[1])
        try:
            parts = [quantize(part, kind, importance).reshape(-1) for part in rows.split(step)]
        except ModelError as error:
            raise ModelError(error.what, where=name, found=error.found, expected=error.expected,
                             fix='use quantization_method="bf16"') from error
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        with self._writing():
            self._writer.write_tensor_data(data.numpy())

    def close(self) -> None:
        """Close the file, whole or not."""
        with self._writing():
            self._writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            found = error.strerror or f"a write that was cut short, {error}"  # numpy's has no number
            raise OutputError("the GGUF file cannot be written", where=str(self.path.parent),
                              found=f"{found}; {free_bytes(self.path):,} bytes free",
                              expected=f"room for {self.size:,} bytes",
                              fix="make room, or choose a folder on another disk") from error


def file_fields(recipe: Recipe, name: str) -> Fields:
    """What a file says of itself in general."""
    import gguf

    return {"general.type": "model", "general.name": name, "general.file_type": recipe.file_type,
            "general.quantization_version": gguf.GGML_QUANT_VERSION}


def _type_of(value: Any) -> Any:
    from gguf import GGUFValueType as Type

    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING, list: Type.ARRAY}
    return kinds[type(value)]
