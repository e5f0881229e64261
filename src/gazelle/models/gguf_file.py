"""Reads the header of a GGUF file: metadata and tensor table, every count and offset checked before it is used.

`gguf.GGUFReader` keeps one numpy view per vocabulary entry, which takes seconds, and trusts the file's own counts.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np

from gazelle.base.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 2**16  # tensors, or settings; the largest models have some thousands


class Strings(Sequence[str]):
    """Texts of an array in a file, made when they are asked for: as objects they take many times as much memory."""

    def __init__(self, raw: bytes, ends: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        self._raw, self._ends = raw, ends  # ends[i] is where text i ends in raw; 8 bytes of length lie before each

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._raw[(self._ends[at - 1] if at else 0) + 8:self._ends[at]].decode()


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table. `shape` is in torch's order, slowest first; `start` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int  # a gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself. Arrays in `metadata` are numpy's, or `Strings`; `get` makes lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model family, such as "llama" or "qwen2"."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata value `key`, or `default` if the file has none. Whole numbers pass for float."""
        value = self.metadata.get(key, default)
        if kind is list and isinstance(value, np.ndarray | Strings):
            return value.tolist() if isinstance(value, np.ndarray) else list(value)
        if value is default or type(value) is kind or (kind is float and type(value) is int):
            return value
        raise ModelError("a setting of the wrong kind", where=f"{self.path}, {key}", found=repr(value),
                         expected=f"a value of type {kind.__name__}", fix="download or export the file again")

    def read(self, name: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """The named tensor as float32 of its own shape, dequantised if need be."""
        import gguf

        entry = self.tensors[name]
        kind = gguf.GGMLQuantizationType(entry.kind)
        raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.size,))
        try:
            rows = raw.reshape(*entry.shape[:-1], -1)
            return np.asarray(gguf.quants.dequantize(rows, kind), dtype=np.float32).reshape(entry.shape)
        except NotImplementedError as error:
            raise ModelError("a tensor is stored in a format that cannot be unpacked", where=f"{self.path}, {name}",
                             found=kind.name, expected="F32, F16, BF16 or one of ggml's Q formats",
                             fix="export the model again as q8_0 or f16") from error


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path`. Costs about 0.2 s for a vocabulary of 50,000.

    Raises:
        ModelError: not a GGUF file, a version or type we do not know, or a file shorter than its header says.
    """
    import gguf

    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise ModelError("this is not a GGUF file", where=str(path), found="no GGUF mark at its start",
                             expected="a file that begins with the letters GGUF", fix="download the file again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read(dict(gguf.GGML_QUANT_SIZES))


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def read(self, block_sizes: dict[Any, tuple[int, int]]) -> GgufFile:
        version = self.scalar("I")
        if version not in (2, 3):
            raise self.error("GGUF version not known", f"version {version}", "version 2 or 3, little-endian")
        tensor_count = self.count(self.scalar("Q"), 24, "tensors")
        field_count = self.count(self.scalar("Q"), 13, "metadata fields")
        metadata = {}
        for _ in range(field_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        rows = [(self.string(), self.shape(), self.scalar("I"), self.scalar("Q")) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self.error("nonsense alignment", alignment, "a positive whole number")
        data_start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in rows:
            if kind not in block_sizes:
                raise self.error(f"tensor {name} has a storage type we do not know", kind, "a ggml type of gguf-py")
            block, size = block_sizes[kind]
            if not shape or 0 in shape or shape[-1] % block:
                raise self.error(f"tensor {name} has a shape its storage cannot have", shape,
                                 f"a last dimension that is a multiple of {block}")
            entry = TensorEntry(name, shape, int(kind), data_start + offset, prod(shape) // block * size)
            if entry.start + entry.size > len(self.data):
                raise self.error(f"the file ends before tensor {name} does", f"{len(self.data):,} bytes",
                                 f"at least {entry.start + entry.size:,} bytes")
            tensors[name] = entry
        return GgufFile(self.path, metadata, tensors)

    def error(self, what: str, found: object, expected: str) -> ModelError:
        return ModelError(f"the GGUF file is damaged or of a newer kind: {what}", where=str(self.path), found=found,
                          expected=expected, fix="download or export the file again")

    def take(self, size: int) -> int:
        """Advance by `size` bytes and give back where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise self.error("the file ends inside its header", f"{len(self.data):,} bytes",
                             f"at least {start + size:,} bytes")
        self.at += size
        return start

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]
        # 1e-5 kept in 32 bits is meant as 1e-5, and not as the float64 that lies nearest.
        return float(str(np.float32(value))) if code == "f" else value

    def count(self, value: int, least_bytes: int, what: str) -> int:
        """`value`, checked: that many items of `least_bytes` must fit into what is left of the file."""
        if value * least_bytes > len(self.data) - self.at:
            raise self.error(f"it claims {value:,} {what}", f"{len(self.data):,} bytes in the file",
                             "a file large enough to hold them")
        if what in ("tensors", "metadata fields") and value > _MOST:
            raise self.error("more of one thing than any model has", f"{value:,} {what}", f"at most {_MOST:,}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        try:
            return self.data[start:start + size].decode()
        except UnicodeDecodeError as error:
            raise self.error("text that is not UTF-8", f"byte {start + error.start}", "UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error("a metadata value of unknown type", kind, "a type from 0 to 12")
        item, size = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return self.strings(self.count(size, 8, "strings"))
        if item not in _SCALARS:
            raise self.error("an array of unknown type", item, "numbers or strings")
        dtype = np.dtype("<" + _SCALARS[item])
        start = self.take(self.count(size, dtype.itemsize, "numbers") * dtype.itemsize)
        return np.frombuffer(self.data[start:self.at], dtype)

    def strings(self, size: int) -> Strings:
        """`size` texts, each checked to be UTF-8."""
        start, ends = self.at, np.empty(size, np.int64)
        for number in range(size):
            self.string()
            ends[number] = self.at - start
        return Strings(self.data[start:self.at], ends)

    def shape(self) -> tuple[int, ...]:
        dimensions = self.scalar("I")
        if dimensions > 4:
            raise self.error("a tensor with too many dimensions", dimensions, "at most 4")
        return tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
