"""Forward passes of rows that are at different places, each going on from what the cache has of it.

Shapes: T tokens of a pass, R rows, V vocabulary.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gazelle.adapters.mixed import MixedAdapters
from gazelle.adapters.unwrap import unwrap
from gazelle.generate.paged import NAME, Group, PagedCache, Step, pad_tables, register
from gazelle.generate.rows import Row
from gazelle.generate.static import StaticDecode
from gazelle.models.packed import Attention

_FEW = 256  # tokens: rows of fewer attend together, whatever their lengths


class Runner(Protocol):
    """Computes rows."""

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Logits [R, V] of the wanted rows, in their order."""

    def drop(self, owner: Hashable, pages: Sequence[int], *, broken: bool) -> None:
        """A request is over, or has to start again; if it is `broken`, `pages`, which are its alone, may hold NaN."""


class PagedRunner:
    """All rows in one pass, over a paged cache.

    Args:
        model: one for which `models.packed.supports_packing` has nothing to say.
        adapters: of the model.
        cache: for the keys and values.
        static: whether passes of one token a row run in fixed shapes, recorded as CUDA graphs where there is a GPU.
    """

    def __init__(self, model: Any, adapters: MixedAdapters, cache: PagedCache, *, static: bool) -> None:
        register()
        self.inner = unwrap(model)
        self.adapters, self.cache = adapters, cache
        self.attention = Attention(self.inner, NAME)
        self.device = self.inner.get_input_embeddings().weight.device
        self.rotary = rotary_kind(self.inner)
        self.static = StaticDecode(self) if static and self.rotary(1) == self.rotary(1 << 30) else None

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> Tensor:
        if self.static is not None and all(len(row.ids) == 1 and row.wanted for row in rows):
            return self.static.run(rows)
        passes: dict[Hashable, list[int]] = {}
        for index, row in enumerate(rows):
            passes.setdefault(self.rotary(row.stop), []).append(index)
        logits: dict[int, Tensor] = {}
        for chosen in passes.values():
            order, found = self._pass([rows[index] for index in chosen])
            logits |= {chosen[index]: found[at] for at, index in enumerate(order)}
        wanted = [logits[index] for index, row in enumerate(rows) if row.wanted]
        return torch.stack(wanted) if wanted else torch.empty(0, 0)

    def drop(self, owner: Hashable, pages: Sequence[int], *, broken: bool) -> None:
        if broken:
            self.cache.clear(pages)

    def _pass(self, rows: list[Row]) -> tuple[list[int], Tensor]:
        """The numbers of the wanted rows in the order of their logits, and these."""
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids) > 1, rows[index].stop))
        rows = [rows[index] for index in order]
        size = self.cache.size
        ids = [token for row in rows for token in row.ids]
        positions = [place for row in rows for place in range(row.start, row.stop)]
        slots = [row.pages[place // size] * size + place % size for row in rows
                 for place in range(row.start, row.stop)]
        ends = torch.tensor([len(row.ids) for row in rows]).cumsum(0) - 1
        kept = ends[torch.tensor([row.wanted for row in rows])].to(self.device)
        numbers = torch.tensor([ids, positions, slots], device=self.device)
        self.cache.slots = numbers[2]
        step = Step(self.cache, self._groups(rows, numbers[1]))
        counts = [len(row.ids) for row in rows]
        with self.adapters.applied([row.adapter for row in rows], counts, kept):
            logits = self.forward(numbers[0], numbers[1], kept, step)
        return [index for index, row in zip(order, rows, strict=True) if row.wanted], logits

    def forward(self, ids: Tensor, positions: Tensor, kept: Tensor, step: Step) -> Tensor:
        """Logits [R, V] after the tokens number `kept` of `ids` [T], which stand at `positions` [T] of their rows."""
        self.attention.put()
        try:
            output = self.inner(input_ids=ids[None], position_ids=positions[None], past_key_values=self.cache,
                                use_cache=True, logits_to_keep=kept, gazelle_step=step)
        finally:
            self.attention.put_back()
        return output.logits[0]

    def _groups(self, rows: list[Row], positions: Tensor) -> list[Group]:
        """Rows of one token each and of similar length attend together, rows of several by themselves."""
        groups, start, first = [], 0, 0
        while first < len(rows):
            last = first + 1
            if len(rows[first].ids) == 1:
                longest = max(2 * rows[first].stop, _FEW)
                while last < len(rows) and len(rows[last].ids) == 1 and rows[last].stop <= longest:
                    last += 1
            chosen = rows[first:last]
            tokens = sum(len(row.ids) for row in chosen)
            tables = pad_tables([row.pages[:-(-row.stop // self.cache.size)] for row in chosen])
            groups.append(Group(start, positions[start:start + tokens].view(len(chosen), -1),
                                torch.tensor(tables, device=self.device)))
            first, start = last, start + tokens
        return groups


class PlainRunner:
    """Each row in a pass of its own, with a cache of transformers' own: for models whose attention cannot be swapped.

    Args:
        model: a causal language model.
        adapters: of the model.
    """

    def __init__(self, model: Any, adapters: MixedAdapters) -> None:
        self.inner = unwrap(model)
        self.adapters = adapters
        self.device = self.inner.get_input_embeddings().weight.device
        self._caches: dict[Hashable, Any] = {}

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> Tensor:
        found = []
        for row in rows:
            if row.start == 0:
                self._caches.pop(row.owner, None)
            last = torch.tensor([len(row.ids) - 1], device=self.device)
            with self.adapters.applied([row.adapter], [len(row.ids)], last):
                output = self.inner(input_ids=torch.tensor([list(row.ids)], device=self.device), use_cache=True,
                                    past_key_values=self._caches.get(row.owner), logits_to_keep=1)
            self._caches[row.owner] = output.past_key_values
            if row.wanted:
                found.append(output.logits[0, -1])
        return torch.stack(found) if found else torch.empty(0, 0)

    def drop(self, owner: Hashable, pages: Sequence[int], *, broken: bool) -> None:
        self._caches.pop(owner, None)


def rotary_kind(inner: Any) -> Callable[[int], Hashable]:
    """What of a row's length decides its rotary frequencies: rows of different kinds cannot share a pass or a page.

    LongRoPE has one set of frequencies up to the original context and another beyond it, dynamic scaling another for
    every length; both look at the longest row of a pass.
    """
    config = inner.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    original = rope.get("original_max_position_embeddings") \
        or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    if "dynamic" in kinds:
        return lambda length: max(length, original)
    if "longrope" in kinds:
        return lambda length: length > original
    return lambda _: None
