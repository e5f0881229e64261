"""Passes of one token a row in few fixed shapes, which a GPU records once as CUDA graphs and replays.

Everything that differs from step to step lies in tensors that stay where they are, so a pass has no decision of the
host in it. On a CPU the same code runs without being recorded.

Shapes: R rows, B pages a row, C columns of all adapters, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazelle.generate.paged import Group, Step
from gazelle.generate.rows import Row

if TYPE_CHECKING:
    from gazelle.generate.runner import PagedRunner

_WARM_UPS = 2


class StaticDecode:
    """The next token of every row, by whichever recorded shape is the smallest that has room.

    Shapes are powers of two, so that few are recorded: rows beyond the real ones write into the cache's scratch page.
    """

    def __init__(self, runner: "PagedRunner") -> None:
        self._runner = runner
        self._shapes: dict[tuple[int, int], _Shape] = {}
        # One after another graphs are replayed and their logits read, so they can share what they compute in.
        self._pool = torch.cuda.graph_pool_handle() if runner.device.type == "cuda" else None

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Logits [R, V] of rows of one token each."""
        size = self._runner.cache.size
        most = max(-(-row.stop // size) for row in rows)
        key = (_power(len(rows)), _power(most))
        if key not in self._shapes:
            self._shapes[key] = _Shape(self._runner, *key, self._pool)
        return self._shapes[key].run(rows)


class _Shape:
    def __init__(self, runner: "PagedRunner", R: int, B: int, pool: Any) -> None:
        self.pool = pool
        self.runner, self.R, self.B = runner, R, B
        device = runner.device
        # ids, positions, slots, and the table of pages behind them: one copy to the device a step
        self.host = torch.zeros(R * (3 + B), dtype=torch.long, pin_memory=device.type == "cuda")
        self.numbers = torch.zeros_like(self.host, device=device)
        self.mask = torch.zeros(R, runner.adapters.columns, device=device)
        self.asked: list[str | None] | None = None
        self.kept = torch.arange(R, device=device)
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def run(self, rows: Sequence[Row]) -> Tensor:
        self._fill(rows)
        if self.runner.device.type != "cuda":
            return self._pass()[:len(rows)]
        if self.recorded is None:
            self.recorded = self._record()
        graph, logits = self.recorded
        graph.replay()
        return logits[:len(rows)]

    def _fill(self, rows: Sequence[Row]) -> None:
        size, spare = self.runner.cache.size, self.R - len(rows)
        scratch = self.runner.cache.scratch
        places = [row.start for row in rows]
        slots = [row.pages[row.start // size] * size + row.start % size for row in rows]
        table = [page for row in rows for page in [*row.pages, *[scratch] * self.B][:self.B]]
        flat = [*(row.ids[0] for row in rows), *[0] * spare, *places, *[0] * spare, *slots,
                *[scratch * size] * spare, *table, *[scratch] * (spare * self.B)]
        self.host.copy_(torch.tensor(flat))
        self.numbers.copy_(self.host, non_blocking=True)
        asked = [row.adapter for row in rows]
        if asked != self.asked and self.mask.numel():
            self.mask[:len(rows)] = torch.tensor([self.runner.adapters.row(name) for name in asked],
                                                 device=self.mask.device)
            self.asked = asked

    def _pass(self) -> Tensor:
        R = self.R
        ids, positions, slots = self.numbers[:3 * R].view(3, R)
        self.runner.cache.slots = slots
        group = Group(0, positions[:, None], self.numbers[3 * R:].view(R, self.B))
        with self.runner.adapters.applied_by(self.mask):
            return self.runner.forward(ids, positions, self.kept, Step(self.runner.cache, [group]))

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(self.runner.device)
        stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(stream):  # what is made at the first call must not be made while recording
            for _ in range(_WARM_UPS):
                self._pass()
        torch.cuda.current_stream(self.runner.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self._pass()
        return graph, logits


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
