"""FlashAttention 2 on rows that lie end to end, as torch ships it.

Called through the operator that `torch.nn.attention.varlen` wraps: it is differentiable by itself, and its signature
has not changed since long before that module came.
"""

import torch
from torch import Tensor

from gazelle.kernels.attention_dense import Scores, aligned
from gazelle.kernels.attention_rows import Rows


def varlen(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H, D], for 16-bit tensors on a GPU."""
    if scores.softcap is not None or scores.dropout or rows.mask is not None:
        raise ValueError("varlen attention knows no softcap, dropout or mask")
    q, k, v = aligned(q), aligned(k), aligned(v)
    starts = rows.starts(q.device)
    # At a longest row of one token the operator folds heads into rows, which counts on no row being empty.
    length = max(rows.max_length, 2)
    left, right = (None, None) if scores.window is None else (scores.window - 1, 0)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, length, length, 0.0, scores.window is None, False, scale=scores.scale,
        window_size_left=left, window_size_right=right)[0]
