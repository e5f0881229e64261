"""Causal attention inside packed rows: rows lie end to end without padding, and no token sees another row.

Shapes: T tokens of all rows, R rows, L longest row, H heads, G key-value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float,
                     window: int | None = None, softcap: float | None = None, dropout: float = 0.0) -> Tensor:
    """Attend causally within each row, at a cost of R·L² where one block-diagonal mask over all tokens costs T².

    A CPU goes through the rows one by one, which beats batching them twice over. An accelerator gets them as one
    right-padded batch, laid out and taken back without a word between host and device.

    Args:
        q: [1, H, T, D]. k, v: [1, G, T, D] with H a multiple of G.
        cu_seqlens: [R + 1] integers, where each row begins, and T at the end. Empty rows are allowed.
        max_length: at least L, in tokens.
        scale: what scores are multiplied by.
        window: how many tokens, itself included, a token sees; None for all before it.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
        dropout: probability of dropping an attention weight.

    Returns:
        [1, H, T, D], laid out in memory as [1, T, H, D].
    """
    if q.device.type == "cpu":
        sizes = _sizes(cu_seqlens, q.shape[2])
        outputs = [_causal(*row, scale, window, softcap, dropout).transpose(1, 2)
                   for row in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)]
        return torch.cat(outputs, 1).transpose(1, 2)
    return _padded(q, k, v, cu_seqlens, max_length, scale, window, softcap, dropout)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None,
            dropout: float) -> Tensor:
    """Plain causal attention: q [R, H, L, D], k and v [R, G, L, D] -> [R, H, L, D]."""
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if softcap is None:
        mask = None if window is None else _visible(length, window, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                            scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    scores = scores.masked_fill(~_visible(length, window, q.device), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return drop(weights, dropout) @ v


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L], True where a query may look."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return visible if window is None else visible.triu_(1 - window)


def _sizes(cu_seqlens: Tensor, length: int) -> list[int]:
    sizes = [size for size in cu_seqlens.diff().tolist() if size]
    if sum(sizes) != length:
        raise ValueError(f"cu_seqlens describes {sum(sizes)} tokens, but there are {length}")
    return sizes


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int | None,
            softcap: float | None, dropout: float) -> Tensor:
    rows = _rows_of(cu_seqlens, max_length, q.shape[2])
    q, k, v = (_Pad.apply(x, rows) for x in (q, k, v))
    # Padding lies behind every real token, so causality alone hides it.
    return _Unpad.apply(_causal(q, k, v, scale, window, softcap, dropout), rows)


@dataclass(frozen=True)
class _Rows:
    """Where tokens go in the padded batch: `slots` [R·L] takes tokens there, `tokens` [T] takes them back."""

    cu_seqlens: Tensor
    version: int
    slots: Tensor
    tokens: Tensor
    count: int


# The layers of one forward pass share their cu_seqlens, so remembering the last is enough. Holding on to the tensor
# itself keeps another from being taken for it.
_last: _Rows | None = None


def _rows_of(cu_seqlens: Tensor, max_length: int, length: int) -> _Rows:
    global _last
    rows = _last
    if rows is not None and rows.cu_seqlens is cu_seqlens and rows.version == cu_seqlens._version \
            and len(rows.tokens) == length and len(rows.slots) == rows.count * max_length:
        return rows
    with torch.no_grad():
        begins, device = cu_seqlens[:-1].long(), cu_seqlens.device
        slots = (begins[:, None] + torch.arange(max_length, device=device)).clamp_(max=length - 1).flatten()
        row = torch.repeat_interleave(torch.arange(len(begins), device=device), cu_seqlens.diff(), output_size=length)
        tokens = row * max_length + torch.arange(length, device=device) - begins[row]
    _last = _Rows(cu_seqlens, cu_seqlens._version, slots, tokens, len(begins))
    return _last


class _Pad(torch.autograd.Function):
    """[1, H, T, D] -> [R, H, L, D]. Padding slots hold other tokens; nothing reads them, so their gradient is zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return x[0].transpose(0, 1).index_select(0, rows.slots).unflatten(0, (rows.count, -1)).transpose(1, 2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        rows: _Rows = ctx.rows  # type: ignore[attr-defined]
        return grad.transpose(1, 2).flatten(0, 1).index_select(0, rows.tokens).transpose(0, 1)[None], None


class _Unpad(torch.autograd.Function):
    """[R, H, L, D] -> [1, H, T, D]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return x.transpose(1, 2).flatten(0, 1).index_select(0, rows.tokens).transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        rows: _Rows = ctx.rows  # type: ignore[attr-defined]
        padded = grad.new_zeros(len(rows.slots), grad.shape[1], grad.shape[3])
        padded.index_copy_(0, rows.tokens, grad[0].transpose(0, 1))
        return padded.unflatten(0, (rows.count, -1)).transpose(1, 2), None
