"""A paged cache of keys and values, and attention over it, for layers that transformers wrote.

All tokens of a step lie end to end as one sequence [1, T], each with its own position, as packed rows do in training;
the attention function, which transformers is told of by name, knows which pages each of them looks at.

Shapes: T tokens of a step, H heads, G key-value heads, D head size, R rows of a group, C tokens a row has in this step,
B pages a row has at most, P tokens a page, L = B·P.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NAME = "gazelle_paged"


class PagedCache:
    """Keys and values of all layers, in pages. Layers get their room when they first write.

    It goes by the name of `past_key_values` through a model's forward pass: `update` puts a step's keys and values
    into their pages and hands them back unread.

    Args:
        pages: how many. There is one more, `scratch`, for what nobody reads.
        size: P.
    """

    is_compileable = False

    def __init__(self, pages: int, size: int) -> None:
        self.pages, self.size = pages, size
        self.scratch = pages
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        # [T]: where each token of the step goes, in tokens from the first page
        self.slots = torch.empty(0, dtype=torch.long)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep `key` and `value` [1, G, T, D]."""
        if layer not in self.layers:
            self.layers[layer] = self._room(key), self._room(value)
        for store, x in zip(self.layers[layer], (key, value), strict=True):
            store.index_copy_(0, self.slots, x[0].transpose(0, 1))
        return key, value

    def _room(self, x: Tensor) -> Tensor:
        """Zeros [(pages + 1)·P, G, D]: what a mask hides must be finite, for 0 times NaN is NaN."""
        shape = (self.pages + 1) * self.size, x.shape[1], x.shape[3]
        if x.device.type != "cpu":
            return torch.zeros(shape, dtype=x.dtype, device=x.device)
        # Memory from numpy is the system's zeros, and taken when it is first written to.
        room = np.zeros(math.prod(shape) * x.element_size(), dtype=np.uint8)
        return torch.from_numpy(room).view(x.dtype).view(shape)

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, G, L, D] of the pages in `table` [R, B]."""
        R, B = table.shape
        found = []
        for store in self.layers[layer]:
            pages = store.view(self.pages + 1, -1).index_select(0, table.flatten())
            found.append(pages.view(R, B * self.size, *store.shape[1:]).transpose(1, 2))
        return found[0], found[1]

    def clear(self, pages: Sequence[int]) -> None:
        """Write zeros over pages that may hold NaN."""
        numbers = torch.tensor(pages, dtype=torch.long)
        for stores in self.layers.values():
            for store in stores:
                store.view(self.pages + 1, -1)[numbers.to(store.device)] = 0

    def get_seq_length(self, *_: Any) -> int:
        """Nothing: positions are always given."""
        return 0


@dataclass
class Group:
    """Rows of a step that attend together.

    Attributes:
        start: their first token in the step; they have R·C of them.
        positions: [R, C] where each token stands in its row.
        table: [R, B] pages.
    """

    start: int
    positions: Tensor
    table: Tensor
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, size: int, dtype: torch.dtype) -> Tensor:
        """[R, 1, C, L]: 0 where a token may look and -inf elsewhere."""
        if window not in self._masks:
            there = torch.arange(self.table.shape[1] * size, device=self.positions.device)
            here = self.positions[:, :, None]
            seen = there <= here
            if window is not None:
                seen &= there > here - window
            self._masks[window] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, float("-inf"))[:, None]
        return self._masks[window]


@dataclass
class Step:
    """One forward pass over the cache: how its tokens are laid out."""

    cache: PagedCache
    groups: list[Group]


def register() -> None:
    """Tell transformers of the attention function. No mask function is registered beside it, so no mask is made."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(NAME, _attend)


def _attend(module: nn.Module, query: Tensor, *_: Any, scaling: float | None = None, sliding_window: int | None = None,
            softcap: float | None = None, gazelle_step: Step | None = None, **__: Any) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D] -> [1, T, H, D]. Keys and values are in the cache."""
    if gazelle_step is None:
        raise RuntimeError("attention over pages is on, but the step did not come with the batch")
    T, H = query.shape[2], query.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query[0].transpose(0, 1)
    parts = []
    for group in gazelle_step.groups:
        R, C = group.positions.shape
        k, v = gazelle_step.cache.read(module.layer_idx, group.table)  # type: ignore[arg-type]
        q = tokens[group.start:group.start + R * C].view(R, C, H, -1)
        mask = group.mask(sliding_window, gazelle_step.cache.size, query.dtype)
        parts.append(_grouped(q, k, v, mask, scale, softcap).reshape(R * C, H, -1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(1, T, H, -1), None


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q [R, C, H, D], k and v [R, G, L, D], mask [R, 1, C, L] -> [R, C, H, D].

    The heads that share a key-value head become further queries of it, so that keys are not repeated.
    """
    R, C, H, D = q.shape
    G = k.shape[1]
    q = q.view(R, C, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(R, G, H // G * C, D)
    if C > 1:
        mask = mask.repeat(1, 1, H // G, 1)
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap + mask
        out = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return out.view(R, G, H // G, C, -1).permute(0, 3, 1, 2, 4).reshape(R, C, H, -1)


def pad_tables(tables: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tables of pages, filled up to the longest with page 0, which nothing reads there."""
    most = max(map(len, tables))
    return [[*table, *[0] * (most - len(table))] for table in tables]
