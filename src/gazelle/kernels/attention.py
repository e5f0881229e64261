"""Causal attention inside rows that lie end to end without padding: no token sees another row.

Shapes: T tokens of all rows, R rows, L longest row, H heads, G key-value heads, D head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.kernels.attention_dense import Scores, cudnn, flash, is_short, reference, sdpa
from gazelle.kernels.attention_flex import flex
from gazelle.kernels.attention_rows import Rows
from gazelle.kernels.attention_varlen import varlen

__all__ = ["BACKENDS", "Rows", "attention", "choose", "packed_attention"]


@dataclass(frozen=True)
class Backend:
    """A way to attend, and what it takes (for `choose`; forced by name, it raises by itself at what it cannot do)."""

    run: Callable[[Tensor, Tensor, Tensor, Rows, Scores], Tensor]
    kernel: bool = True  # compiled for NVIDIA or AMD, for 16-bit tensors with D a multiple of 8
    capability: tuple[int, int] = (8, 0)
    head_dim: int = 256
    shortest: int = 2
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    mask: bool = False
    amd: bool = True
    repeatable: bool = True  # the same bits in every run under torch.use_deterministic_algorithms


BACKENDS = {
    "cudnn": Backend(cudnn, capability=(9, 0), head_dim=128, amd=False, shortest=1024, repeatable=False),
    "flash": Backend(flash),
    "varlen": Backend(varlen, window=True),
    "flex": Backend(flex, window=True, softcap=True, shortest=64),
    "sdpa": Backend(sdpa, kernel=False, window=True, dropout=True, mask=True),
    "reference": Backend(reference, kernel=False, window=True, softcap=True, dropout=True, mask=True),
}
# The first that takes a case gets it, by measurement (benchmarks/ops/attention.py). Dense kernels take packed rows too,
# padded, if forced.
UNIFORM = ("cudnn", "varlen", "flash", "flex", "sdpa", "reference")
PACKED = ("varlen", "flex", "sdpa", "reference")


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, window: int | None = None,
              softcap: float | None = None, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """Attend causally within each row. Differentiable.

    Args:
        q: [T, H, D]. k, v: [T, G, D] with H a multiple of G; any strides with unit stride in D.
        rows: how rows lie in the T tokens.
        scale: what scores are multiplied by.
        window: how many tokens, itself included, a token sees; None for all before it. It narrows `rows.mask` too.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
        dropout: probability of dropping an attention weight.
        backend: a key of `BACKENDS`, or "auto" for what `choose` says.

    Returns:
        [T, H, D], contiguous.

    Raises:
        ValueError: a backend forced by name cannot do what is asked of it.
    """
    if window is not None and window >= rows.max_length:
        window = None
    if backend == "auto":
        backend = choose(q, rows, window, softcap, dropout)
    return BACKENDS[backend].run(q, k, v, rows, Scores(scale, window, softcap, dropout)).contiguous()


def choose(q: Tensor, rows: Rows, window: int | None = None, softcap: float | None = None,
           dropout: float = 0.0) -> str:
    """The fastest backend that takes such queries [T, H, D] in such rows."""
    if q.device.type == "cpu":
        return "reference" if softcap is not None or is_short(rows, q.shape[0]) else "sdpa"
    needs = {"window": window is not None, "softcap": softcap is not None, "dropout": dropout > 0,
             "mask": rows.mask is not None}
    for name in UNIFORM if rows.uniform else PACKED:
        backend = BACKENDS[name]
        if torch.are_deterministic_algorithms_enabled() and not backend.repeatable:
            continue
        if all(getattr(backend, need) for need, needed in needs.items() if needed) \
                and (not backend.kernel or _has_kernel(backend, q, rows)):
            return name
    return "reference"


def _has_kernel(backend: Backend, q: Tensor, rows: Rows) -> bool:
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    amd = torch.version.hip is not None
    head_dim, capability = q.shape[-1], _capability(q.device)
    return head_dim % 8 == 0 and head_dim <= backend.head_dim and rows.max_length >= backend.shortest \
        and (backend.amd if amd else capability >= backend.capability)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float,
                     window: int | None = None, softcap: float | None = None, dropout: float = 0.0) -> Tensor:
    """`attention` in the layout of Hugging Face models, for rows without padding.

    Args:
        q: [1, H, T, D]. k, v: [1, G, T, D].
        cu_seqlens: [R + 1] integers, where each row begins, and T at the end. Empty rows are allowed.
        max_length: at least L, in tokens.
        scale, window, softcap, dropout: as in `attention`.

    Returns:
        [1, H, T, D], laid out in memory as [1, T, H, D].
    """
    rows = _rows_of(cu_seqlens, max_length)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    # Here T is another for each batch, and flex would compile for each.
    backend = "auto" if softcap is None else "reference"
    return attention(q, k, v, rows, scale, window, softcap, dropout, backend).transpose(0, 1)[None]


# The layers of one forward pass share their cu_seqlens, so remembering the last is enough. Holding on to the tensor
# itself keeps another from being taken for it.
_last: Rows | None = None


def _rows_of(cu_seqlens: Tensor, max_length: int) -> Rows:
    global _last
    if _last is None or _last.cu_seqlens is not cu_seqlens or _last.max_length != max_length:
        _last = Rows(len(cu_seqlens) - 1, max_length, cu_seqlens=cu_seqlens)
    return _last
