"""Dropout whose mask is a function of a seed, so that a backward pass makes it again instead of keeping it."""

import torch
from torch import Tensor

_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)  # odd constants of the murmur3 and golden-ratio hashes


def new_seed(device: torch.device) -> Tensor:
    """A seed [1] (int64) from torch's generator, on the device: it can be drawn inside a CUDA graph."""
    return torch.randint(0, 2**31 - 1, (1,), device=device)


def dropped(x: Tensor, rate: float, seed: Tensor, stream: int) -> Tensor:
    """x [T, K] with each element zero with probability `rate`, the others divided by 1 - rate.

    Args:
        x: what is dropped from.
        rate: between 0 and 1.
        seed: from `new_seed`. The same seed and stream give the same mask for the same shape.
        stream: sets masks apart that share a seed.
    """
    if rate == 0:
        return x
    T, K = x.shape
    row = torch.arange(T, device=x.device, dtype=torch.int64)[:, None]
    column = torch.arange(K, device=x.device, dtype=torch.int64)
    bits = _mixed(_mixed(row * K + column + _MIX[0] * stream) ^ seed)
    keep = bits >= int(rate * 2**32)
    return torch.where(keep, x / (1 - rate), 0)


def _mixed(bits: Tensor) -> Tensor:
    """Finaliser of murmur3 on the low 32 bits (https://github.com/aappleby/smhasher, public domain)."""
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * _MIX[1]) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * _MIX[2]) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
