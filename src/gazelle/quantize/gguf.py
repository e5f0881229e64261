"""Weights in the block formats of GGUF files, there and back, without llama.cpp.

    data = quantize(weight, "q4_k")        # [N, K] -> [N, bytes of a row]
    weight = dequantize(data, "q4_k")      # float32, bit for bit what llama.cpp reads

Blocks of 32 (`gguf_simple`) come out byte for byte as llama.cpp makes them; blocks of 256 (`gguf_super`) with errors as
small as its own. Blocks lie along the last dimension. Tensors on a GPU are worked on there.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gazelle.base.errors import ModelError, OptionError, nearest
from gazelle.quantize import gguf_simple, gguf_super

_PIECE_CPU, _PIECE_GPU = 2**18, 2**23  # weights worked on at a time, with some ten times as much memory
_LARGEST = 1e9  # more than any block can hold, and so little that no sum overflows


@dataclass(frozen=True)
class Kind:
    """A type of tensors in GGUF files."""

    name: str
    value: int  # gguf.GGMLQuantizationType
    block: int  # weights in a block
    size: int  # bytes of a block
    encode: Callable[[Tensor, Tensor | None], Tensor] = field(repr=False)  # x [B, block], importance -> [B, size]
    decode: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def searched(self) -> bool:
        """Whether importance changes what comes out."""
        return self.block > 1 and self.name != "q8_0"

    def row(self, K: int) -> int:
        """Bytes of K weights.

        Raises:
            ModelError: K weights are not whole blocks.
        """
        if K % self.block:
            raise ModelError(f"rows of this length cannot be stored as {self.name}", found=f"{K:,} weights in a row",
                             expected=f"a multiple of {self.block}",
                             fix="store this tensor as q8_0, which takes multiples of 32, or as f16")
        return K // self.block * self.size


def _kinds() -> dict[str, Kind]:
    found = []
    for name, value, dtype in (("f32", 0, torch.float32), ("f16", 1, torch.float16), ("bf16", 30, torch.bfloat16)):
        found.append(Kind(name, value, 1, dtype.itemsize, partial(gguf_simple.encode_type, dtype),
                          partial(gguf_simple.decode_type, dtype)))
    found.append(Kind("q8_0", 8, 32, 34, gguf_simple.encode_q8, gguf_simple.decode_q8))
    for name, value, size, bits, minimum in (("q4_0", 2, 18, 4, False), ("q4_1", 3, 20, 4, True),
                                             ("q5_0", 6, 22, 5, False), ("q5_1", 7, 24, 5, True)):
        simple = gguf_simple.Simple(bits, minimum)
        found.append(Kind(name, value, 32, size, simple.encode, simple.decode))
    for name, value, size, encode, decode in (("q2_k", 10, 84, gguf_super.encode_q2, gguf_super.decode_q2),
                                              ("q3_k", 11, 110, gguf_super.encode_q3, gguf_super.decode_q3),
                                              ("q4_k", 12, 144, gguf_super.encode_q4, gguf_super.decode_q4),
                                              ("q5_k", 13, 176, gguf_super.encode_q5, gguf_super.decode_q5),
                                              ("q6_k", 14, 210, gguf_super.encode_q6, gguf_super.decode_q6)):
        found.append(Kind(name, value, 256, size, encode, decode))
    return {kind.name: kind for kind in found}


KINDS = _kinds()


@torch.no_grad()
def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """[.., K] of any floating type -> [.., bytes of a row] uint8, on the same device.

    Args:
        weight: rows of K weights, a multiple of the kind's block.
        kind: a name in `KINDS`.
        importance: [K] not negative, how much errors of a column matter: llama.cpp's imatrix. f32, f16, bf16 and q8_0
            have no use for it.

    Raises:
        OptionError: no such kind.
        ModelError: rows are not whole blocks, importance is of another length, or weights are infinite, NaN, or so
            large that float16 cannot hold their scale.
    """
    found = _kind(kind)
    K = _columns(weight, "weight")
    out = torch.empty(*weight.shape[:-1], found.row(K), dtype=torch.uint8, device=weight.device)
    if importance is not None:
        importance = _checked(importance, K).to(weight.device) if found.searched else None
    if importance is not None:
        if found.block == 32:  # llama.cpp takes the mean of the whole row here, and that of a block in k-quants
            power = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square_().flatten() / K
        importance = importance.view(-1, found.block)
    blocks, target = weight.reshape(-1, found.block).contiguous(), out.view(-1, found.size)

    def piece(part: slice) -> None:
        x, chosen = blocks[part].float(), None
        if found.block > 1 and not (largest := x.abs().amax()) < _LARGEST:
            raise ModelError(f"weights that {kind} cannot hold", found=f"{largest:g}",
                             expected=f"numbers below {_LARGEST:g}",
                             fix="load or download the checkpoint again, or store this tensor as bf16 or f32")
        if importance is not None:
            numbers = torch.arange(part.start, part.start + len(x), device=x.device)
            chosen = importance.index_select(0, numbers % len(importance))
            if found.block == 32:
                chosen *= x.square().add_(power[numbers // len(importance), None]).sqrt_()
        target[part] = found.encode(x, chosen)

    _run(piece, len(blocks), found.block, weight.device)
    return out


@torch.no_grad()
def dequantize(data: Tensor, kind: str) -> Tensor:
    """[.., bytes of a row] uint8 -> [.., K] float32, bit for bit as llama.cpp reads it.

    Raises:
        OptionError: no such kind.
        ModelError: rows are not whole blocks.
    """
    found = _kind(kind)
    if data.dtype != torch.uint8 or _columns(data, "data") % found.size:
        raise ModelError(f"these are not blocks of {kind}", found=f"{data.dtype}, rows of {data.shape[-1]:,}",
                         expected=f"torch.uint8, rows of a multiple of {found.size}", fix="give what quantize returned")
    out = torch.empty(*data.shape[:-1], data.shape[-1] // found.size * found.block, device=data.device)
    blocks, target = data.reshape(-1, found.size), out.view(-1, found.block)

    def piece(part: slice) -> None:
        target[part] = found.decode(blocks[part])

    _run(piece, len(blocks), found.block, data.device)
    return out


def _run(piece: Callable[[slice], None], blocks: int, block: int, device: torch.device) -> None:
    """Call `piece` for all blocks, some at a time.

    On a CPU each thread takes pieces of its own, and operations are not split among threads: a piece takes hundreds of
    them, and at the end of each all threads would wait for the one whose core is busy with something else.
    """
    step = (_PIECE_CPU if device.type == "cpu" else _PIECE_GPU) // block
    parts = [slice(start, start + step) for start in range(0, blocks, step)]
    if device.type != "cpu" or len(parts) == 1:
        for part in parts:
            piece(part)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(torch.no_grad()(piece), parts))
    finally:
        torch.set_num_threads(threads)  # what the pool's threads set counts for them, and for threads begun later


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise OptionError("no such type of GGUF tensors", found=name, expected="one of " + ", ".join(KINDS),
                          fix=nearest(name, KINDS))
    return KINDS[name]


def _columns(tensor: Tensor, name: str) -> int:
    if not tensor.ndim or not tensor.shape[-1]:
        raise ModelError("a tensor without rows has no blocks", where=name, found=f"shape {tuple(tensor.shape)}",
                         expected="at least one dimension, and numbers in it", fix="leave this tensor out")
    return tensor.shape[-1]


def _checked(importance: Tensor, K: int) -> Tensor:
    values = importance.detach().float()
    if values.shape != (K,) or not bool((values >= 0).all()) or not bool(values.sum().isfinite()):
        raise ModelError("importance that does not fit the weight", found=f"shape {tuple(values.shape)}",
                         expected=f"[{K}] finite numbers, none of them negative",
                         fix="measure the importance again with this model")
    return values
