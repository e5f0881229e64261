"""GGUF's k-quants: 256 weights in groups of 16 or 32, whose scales and offsets are quantised themselves.

Layouts: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h. What counts as a small error is weighed as
llama.cpp weighs it; the search is ours, see `gguf_search`. Shapes: B blocks of 256, G groups of L in one, G·L = 256.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.quantize.gguf_bits import half_bytes, halves, join, small, split
from gazelle.quantize.gguf_search import STEPS, affine, shared, symmetric

BLOCK = 256
_STEPS_Q2 = tuple(step / 4 for step in range(-4, 7))
_SCALE_STEPS = tuple(-step / 2 for step in range(16))


def _weights(x: Tensor, importance: Tensor | None, spread: float) -> Tensor | None:
    """importance·√(spread·mean(x²) + x²), the mean over a block: [B, 256]."""
    if importance is None:
        return None
    squares = x.square()
    return squares.add_(squares.mean(1, keepdim=True), alpha=spread).sqrt_().mul_(importance)


def _plain_weights(groups: Tensor) -> Tensor:
    """√mean(x²) + |x|, the mean over a group: [N, L]."""
    return groups.abs().add_(groups.square().mean(1, keepdim=True).sqrt_())


def _quantised(values: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[B, G], not negative -> their common scale [B, 1], as float16 has it, and multiples of it from 0 to `top`."""
    scale = shared(values, w, 0, top, _SCALE_STEPS)[:, None]
    return scale, (values * _inverse(scale)).round_().clamp_(0, top)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale != 0, scale, torch.inf).reciprocal_()


@dataclass(frozen=True)
class _Affine:
    """x ≈ d·scale·q − m·min: q2_k, q4_k and q5_k."""

    group: int
    bits: int
    scale_bits: int
    spread: float

    def levels(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [B, 256], scales [B, G], mins [B, G], all uint8; d and m [B, 1]."""
        groups, top = x.view(-1, self.group), (1 << self.bits) - 1
        weights = _weights(x, importance, self.spread)
        if weights is not None:
            w = weights.view_as(groups)
        elif self.group == 32:
            w = _plain_weights(groups)
        else:
            w = groups.abs()
        found = affine(groups, w, top, _STEPS_Q2 if self.bits == 2 else STEPS)
        count, scale_top = BLOCK // self.group, (1 << self.scale_bits) - 1
        d, scales = _quantised(found.scale.view(-1, count), found.stiffness.view(-1, count), scale_top)
        scale = (d * scales).flatten()
        m, mins = _quantised(-found.offset_for(scale).view(-1, count), found.w.view(-1, count), scale_top)
        q = groups + (m * mins).view(-1, 1)
        q.mul_(_inverse(scale)[:, None]).round_().clamp_(0, top)
        return small(q).view_as(x), small(scales), small(mins), d, m

    def values(self, q: Tensor, scales: Tensor, mins: Tensor, d: Tensor, m: Tensor) -> Tensor:
        """[B, 256] float32; every product is rounded, as ggml rounds it."""
        groups = q.view(len(q), -1, self.group).float()
        groups *= (d * scales)[:, :, None]
        groups -= (m * mins)[:, :, None]
        return groups.view(-1, BLOCK)


_Q2 = _Affine(16, 2, 4, 1.0)
_Q4 = _Affine(32, 4, 6, 2.0)
_Q5 = _Affine(32, 5, 6, 2.0)


def encode_q2(x: Tensor, importance: Tensor | None) -> Tensor:
    """[B, 256] -> [B, 84]: scales and mins [16], q [64], d, m."""
    q, scales, mins, d, m = _Q2.levels(x, importance)
    low = join(q.view(-1, 2, 4, 32), 2)
    return torch.cat((join(torch.stack((scales, mins), 1), 4), low.flatten(1), half_bytes(d), half_bytes(m)), 1)


def decode_q2(data: Tensor) -> Tensor:
    """[B, 84] -> [B, 256]."""
    q = split(data[:, 16:80].unflatten(1, (2, 32)), 4, 2)
    return _Q2.values(q.flatten(1), data[:, :16] & 15, data[:, :16] >> 4, halves(data[:, 80:82]), halves(data[:, 82:]))


def encode_q4(x: Tensor, importance: Tensor | None) -> Tensor:
    """[B, 256] -> [B, 144]: d, m, scales and mins [12], q [128]."""
    q, scales, mins, d, m = _Q4.levels(x, importance)
    low = join(q.view(-1, 4, 2, 32), 4)
    return torch.cat((half_bytes(d), half_bytes(m), _join_scales(scales, mins), low.flatten(1)), 1)


def decode_q4(data: Tensor) -> Tensor:
    """[B, 144] -> [B, 256]."""
    q = split(data[:, 16:].unflatten(1, (4, 32)), 2, 4)
    return _Q4.values(q.flatten(1), *_split_scales(data[:, 4:16]), halves(data[:, :2]), halves(data[:, 2:4]))


def encode_q5(x: Tensor, importance: Tensor | None) -> Tensor:
    """[B, 256] -> [B, 176]: d, m, scales and mins [12], fifth bits [32], other bits [128]."""
    q, scales, mins, d, m = _Q5.levels(x, importance)
    low, high = join((q & 15).view(-1, 4, 2, 32), 4), join((q >> 4).view(-1, 8, 32), 1)
    return torch.cat((half_bytes(d), half_bytes(m), _join_scales(scales, mins), high, low.flatten(1)), 1)


def decode_q5(data: Tensor) -> Tensor:
    """[B, 176] -> [B, 256]."""
    q = split(data[:, 48:].unflatten(1, (4, 32)), 2, 4).flatten(1)
    q += split(data[:, 16:48], 8, 1).flatten(1) << 4
    return _Q5.values(q, *_split_scales(data[:, 4:16]), halves(data[:, :2]), halves(data[:, 2:4]))


def _join_scales(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight mins of six bits in twelve bytes: the last four of each are cut in two."""
    first = torch.cat((scales[:, :4], mins[:, :4]), 1)
    last = torch.cat((scales[:, 4:], mins[:, 4:]), 1)
    return torch.cat((first | (last >> 4) << 6, (scales[:, 4:] & 15) | mins[:, 4:] << 4), 1)


def _split_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    first, last, high = data[:, :8] & 63, data[:, 8:], data[:, :8] >> 6 << 4
    return torch.cat((first[:, :4], last & 15 | high[:, :4]), 1), torch.cat((first[:, 4:], last >> 4 | high[:, 4:]), 1)


def encode_q3(x: Tensor, importance: Tensor | None) -> Tensor:
    """[B, 256] -> [B, 110]: third bits [32], other bits [64], scales [12], d."""
    groups = x.view(-1, 16)
    weights = _weights(x, importance, 2.0)
    w = _plain_weights(groups) if weights is None else weights.view_as(groups)
    scale, w = symmetric(groups, w, -4, 3, STEPS)
    d = shared(scale.view(-1, 16), w.view(-1, 16), -32, 31, _SCALE_STEPS)
    q, scales, d = _symmetric_levels(x, scale, d, 4, 32)
    scales += 32
    high = join((scales >> 4).view(-1, 4, 4), 2)
    return torch.cat((join((q >> 2).view(-1, 8, 32), 1), join((q & 3).view(-1, 2, 4, 32), 2).flatten(1),
                      join((scales & 15).view(-1, 2, 8), 4), high, half_bytes(d)), 1)


def decode_q3(data: Tensor) -> Tensor:
    """[B, 110] -> [B, 256]."""
    q = split(data[:, 32:96].unflatten(1, (2, 32)), 4, 2).flatten(1)
    q += split(data[:, :32], 8, 1).flatten(1) << 2
    scales = split(data[:, 96:104], 2, 4).flatten(1) + (split(data[:, 104:108], 4, 2).flatten(1) << 4)
    return _symmetric_values(q, scales.float() - 32, halves(data[:, 108:]), 4)


def encode_q6(x: Tensor, importance: Tensor | None) -> Tensor:
    """[B, 256] -> [B, 210]: low bits [128], high bits [64], scales [16], d."""
    groups = x.view(-1, 16)
    w = groups.square() if importance is None else importance.reshape(-1, 16)
    scale, w = symmetric(groups, w, -32, 31, STEPS)
    d = shared(scale.view(-1, 16), w.view(-1, 16), -128, 127, (0.0,))
    q, scales, d = _symmetric_levels(x, scale, d, 32, 128)
    parts = q.view(-1, 2, 4, 32)
    low = join((parts & 15).view(-1, 2, 2, 64), 4)
    return torch.cat((low.flatten(1), join(parts >> 4, 2).flatten(1), scales.view(torch.uint8), half_bytes(d)), 1)


def decode_q6(data: Tensor) -> Tensor:
    """[B, 210] -> [B, 256]."""
    q = split(data[:, :128].unflatten(1, (2, 64)), 2, 4).flatten(1)
    q += split(data[:, 128:192].unflatten(1, (2, 32)), 4, 2).flatten(1) << 4
    return _symmetric_values(q, data[:, 192:208].view(torch.int8).float(), halves(data[:, 208:]), 32)


def _symmetric_levels(x: Tensor, scale: Tensor, d: Tensor, top: int, scale_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """For groups' scales [B·16] and d [B]: q + top [B, 256] uint8, scales [B, 16] int8, d [B, 1]."""
    d = d[:, None]
    scales = (scale.view(-1, 16) * _inverse(d)).round_().clamp_(-scale_top, scale_top - 1)
    q = x.view(-1, 16) * _inverse((d * scales).view(-1, 1))
    q.round_().clamp_(-top, top - 1).add_(top)
    return small(q).view_as(x), scales.to(torch.int8), d


def _symmetric_values(q: Tensor, scales: Tensor, d: Tensor, top: int) -> Tensor:
    groups = q.view(len(q), 16, 16).float().sub_(top)
    return groups.mul_((d * scales)[:, :, None]).view(-1, BLOCK)
