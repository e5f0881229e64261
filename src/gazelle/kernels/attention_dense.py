"""Attention in plain PyTorch and with torch's dense kernels, for batches of rows of one length.

Shapes: T tokens, R rows, L longest row, H heads, G key-value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from gazelle.kernels.attention_rows import Rows, from_batch, to_batch

# By measurement on one and two cores with 9 heads of 64 in float32: up to here one padded batch beats a call a row.
SHORT = 80
PADDING = 1.5  # as long as padding makes no more than this many times the scores


@dataclass(frozen=True)
class Scores:
    """What is done with scores between q·k and the values. See `gazelle.kernels.attention.attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


Dense = Callable[[Tensor, Tensor, Tensor, Scores, Tensor | None], Tensor]


def is_short(rows: Rows, tokens: int) -> bool:
    """True if a CPU does better with rows as one padded batch in plain PyTorch than one by one in torch's kernel."""
    scores = sum(size**2 for size in rows.host_sizes(tokens))
    return rows.max_length <= SHORT and rows.count * rows.max_length**2 <= PADDING * scores


def reference(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """Plain PyTorch; does everything."""
    return _run(_plain, q, k, v, rows, scores)


def sdpa(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """Whatever kernel torch picks; does everything but the soft-cap."""
    if scores.softcap is not None:
        raise ValueError("scaled_dot_product_attention knows no softcap")
    return _run(_sdpa, q, k, v, rows, scores)


def flash(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """torch's FlashAttention 2 (https://arxiv.org/abs/2307.08691), without window."""
    _plainly_causal("flash", rows, scores)
    return _batched(_flash, q, k, v, rows, scores)


def cudnn(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """cuDNN's fused attention, without window."""
    _plainly_causal("cudnn", rows, scores)
    # torch looks up its backward plan by the layout of q, k and v alone. A gradient laid out otherwise than that of the
    # first call would be misread.
    return _ContiguousGradient.apply(_batched(_cudnn, q, k, v, rows, scores))


def aligned(x: Tensor) -> Tensor:
    """x, copied if its rows do not lie on 16-byte boundaries, which GPU kernels take for granted."""
    steps = (*x.stride()[:-1], x.storage_offset())
    fits = x.stride(-1) == 1 and all(step * x.element_size() % 16 == 0 for step in steps)
    return x if fits else x.contiguous()


def _plainly_causal(name: str, rows: Rows, scores: Scores) -> None:
    if scores != Scores(scores.scale) or rows.mask is not None:
        raise ValueError(f"{name} attention knows no window, softcap, dropout or mask")


def _run(dense: Dense, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    if q.device.type == "cpu" and not rows.uniform and not is_short(rows, q.shape[0]):
        return _row_by_row(dense, q, k, v, rows, scores)
    return _batched(dense, q, k, v, rows, scores)


def _batched(dense: Dense, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    mask = mask_of(rows, scores.window, q)
    out = dense(to_batch(q, rows), to_batch(k, rows), to_batch(v, rows), scores, mask)
    return from_batch(out, rows, q.shape[0])


def _row_by_row(dense: Dense, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    sizes = [size for size in rows.host_sizes(q.shape[0]) if size]
    mask = mask_of(rows, scores.window, q)
    outputs = []
    for n, *row in zip(sizes, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        of_q, of_k, of_v = (x.transpose(0, 1)[None] for x in row)
        out = dense(of_q, of_k, of_v, scores, None if mask is None else mask[:n, :n])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def mask_of(rows: Rows, window: int | None, like: Tensor) -> Tensor | None:
    """Where queries may look ([L, L] or [R or 1, 1, L, L], bool or additive), or None for plain causality."""
    device = like.device
    if rows.mask is None:
        return None if window is None else rows.once(
            ("visible", window), device, lambda: visible(rows.max_length, window, device))
    mask = rows.mask
    return rows.once(("mask", window, like.dtype), device, lambda: _own_mask(mask, window, like.dtype))


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L], True where a query may look."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def _own_mask(mask: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    length = mask.shape[-1]
    everything = torch.ones(length, length, dtype=torch.bool, device=mask.device)
    near = everything if window is None else everything.triu(1 - window)
    diagonal = torch.eye(length, dtype=torch.bool, device=mask.device)
    if mask.dtype == torch.bool:
        mask = mask & near
        return mask | (diagonal & ~mask.any(-1, keepdim=True))
    mask = mask.to(dtype).masked_fill(~near, float("-inf"))
    return mask.masked_fill(diagonal & (mask.amax(-1, keepdim=True) == float("-inf")), 0.0)


def _plain(q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Tensor | None) -> Tensor:
    (R, H, L, D), G = q.shape, k.shape[1]
    # The heads that share a key lie side by side as one tall matrix, so that keys and values need not be repeated.
    q, k, v = q.reshape(R * G, H // G * L, D), k.reshape(R * G, L, D), v.reshape(R * G, L, D)
    s = torch.bmm(q * scores.scale, k.transpose(1, 2)).view(R, G, H // G, L, L)
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if mask is None:
        mask = visible(L, None, q.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    s = s + (mask if mask.dim() == 2 else mask[:, :, None])
    weights = s.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.bmm(drop(weights, scores.dropout).view(R * G, -1, L), v).view(R, H, L, D)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scores: Scores, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu":
        # torch's memory-efficient kernel, the one for float32 and for masks, knows no groups: with them, torch would
        # fall back to one that keeps all scores.
        k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
        grouped = False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=scores.dropout, is_causal=mask is None,
                                        scale=scores.scale, enable_gqa=grouped)


def _flash(q: Tensor, k: Tensor, v: Tensor, scores: Scores, _: Tensor | None) -> Tensor:
    q, k, v = aligned(q), aligned(k), aligned(v)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scores.scale)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scores: Scores, _: Tensor | None) -> Tensor:
    q, k, v = aligned(q), aligned(k), aligned(v)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, differentiable, 0.0, True, False,
                                                              scale=scores.scale)[0]


class _ContiguousGradient(torch.autograd.Function):
    """Nothing forward; backward, the gradient in one layout."""

    @staticmethod
    def forward(_: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad.contiguous()
