"""Numbers of a few bits, packed into bytes and taken out of them."""

import torch
from torch import Tensor

from gazelle.base.errors import ModelError


def join(parts: Tensor, bits: int) -> Tensor:
    """[.., P, X] uint8, each below 2**bits -> [.., X]: part p lies `bits`·p above the lowest bit of a byte."""
    byte = parts[..., 0, :]
    for part in range(1, parts.shape[-2]):
        byte = torch.add(byte, parts[..., part, :], alpha=1 << bits * part)
    return byte


def split(data: Tensor, parts: int, bits: int) -> Tensor:
    """What `join` joined: [.., X] uint8 -> [.., P, X]."""
    return torch.stack([(data >> bits * part) & ((1 << bits) - 1) for part in range(parts)], -2)


def half_bytes(values: Tensor) -> Tensor:
    """[B, X] float32 -> [B, 2·X] uint8, as float16.

    Raises:
        ModelError: a value is beyond the range of float16.
    """
    half = values.half()
    if not bool(half.isfinite().all()):
        raise ModelError("a weight is too large", found=f"{float(values.abs().max()):g} to be kept as float16",
                         expected="at most 65,504 in f16, and for the scale of a block",
                         fix="store this tensor as bf16 or f32")
    return half.view(torch.uint8)


def halves(data: Tensor) -> Tensor:
    """[B, 2·X] uint8 -> [B, X] float32, from float16."""
    return data.contiguous().view(torch.float16).float()


def small(values: Tensor) -> Tensor:
    """Whole numbers from 0 to 127 in float32 as uint8, by way of int8, which is faster than straight."""
    return values.to(torch.int8).view(torch.uint8)
