"""Measures what one layer and the loss head take on this device, with random weights of the right shapes.

Shapes: T tokens, N outputs, K inputs, R adapter columns, H hidden, V vocabulary.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gazelle.engine.keep import ATTENTION, KEEP, MLP, OUTPUT, Keep
from gazelle.engine.layer import Call, Layer, Norms, Shared
from gazelle.engine.linear import Adapter, Gradients, Linear, Projection
from gazelle.engine.linear_cpu import make_projection
from gazelle.engine.loss import linear_cross_entropy
from gazelle.engine.outline import Batch, LayerOutline, Outline
from gazelle.engine.passes import Pass
from gazelle.engine.plan import Rates
from gazelle.engine.scratch import Scratch
from gazelle.kernels.attention import Rows
from gazelle.kernels.nf4 import Nested
from gazelle.quantize.storage import NF4, Dense, Int8, Storage

_RUNS_ON_CPU = 2
_LOAD_SECONDS = 0.4
_REPLAYS = 3
_LINK_BYTES = 2**26
_LEAST = 0.1  # of a forward pass


def probe(outline: Outline, batch: Batch, device: torch.device, dtype: torch.dtype, *, precision: str = "auto",
          head: Tensor | None = None) -> Rates:
    """The rates of a model's most frequent layer.

    Takes the memory of one layer with its activations, and the time of some ten passes through it, on a GPU half a
    second.

    Args:
        outline: the model.
        batch: the micro-batch.
        device, dtype: of the computation.
        precision: as in `gazelle.accelerate`.
        head: the head's weight [V, H]; without one, random numbers stand in for it.
    """
    kind = max(set(outline.layers), key=outline.layers.count)
    layer = _Runner(kind, batch, device, dtype, precision)
    runs = {"forward": layer.run(KEEP, backward=False), "kept": layer.run(KEEP), "mlp": layer.run(MLP),
            "attention": layer.run(ATTENTION)}
    if device.type == "cuda":  # choices only where there is host memory apart
        runs["link"] = _copy(device)
        if kind.spec.softcap is None:
            runs["qkv"] = layer.run(OUTPUT)
    if batch.labelled:
        runs["head"] = _head(outline, batch, device, dtype, head)
    took = times(runs, device)
    forward, kept = took["forward"], took["kept"]
    # Whatever the clock says, making something again is never free: what fits is kept, in every run.
    least = _LEAST * forward
    attention, mlp = (max(took[half] - kept, least) for half in ("attention", "mlp"))
    qkv = min(attention, max(took.get("qkv", took["attention"]) - kept, _LEAST * least))
    return Rates(forward=forward, backward=max(kept - forward, 0.0), attention=attention, qkv=qkv, mlp=mlp,
                 head=took.get("head", 0.0), link=_LINK_BYTES / took["link"] if "link" in took else 0.0)


class _Runner:
    """Passes through one random layer."""

    def __init__(self, kind: LayerOutline, batch: Batch, device: torch.device, dtype: torch.dtype,
                 precision: str) -> None:
        spec, self.device = kind.spec, device
        self.layer = _random_layer(kind, device, dtype, precision)
        T = batch.tokens
        whole, rest = divmod(T, batch.longest)
        sizes = (*[batch.longest] * whole, *([rest] if rest else []))
        starts = torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)
        rows = Rows(len(sizes), batch.longest, uniform=not rest, cu_seqlens=starts, sizes=sizes)
        angles = torch.rand(T, spec.head_dim, device=device)
        cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if spec.rotary else (None, None)
        self.call = Call(rows, cos, sin, training=True, seeds=None)
        self.x = torch.randn(T, spec.hidden, device=device).to(dtype)
        self.dy = torch.randn(T, spec.hidden, device=device).to(dtype)

    def run(self, keep: Keep, *, backward: bool = True) -> Callable[[], object]:
        """A pass, to be timed."""

        def run() -> None:
            self.layer.keep, self.layer.shared.gradient = keep, None
            with torch.no_grad():
                way = Pass(self.layer, self.call)
                way.forward_keeping(self.x)
                if backward:
                    way.backward(self.dy, Gradients(self.layer.trainable, in_place=True), wants_input=True)

        return run


def times(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds that each function keeps a device busy: on a CPU the least of a few runs.

    On a GPU they are replayed one after another from one CUDA graph, so that launching their kernels does not count, as
    the host runs ahead; and for as long as it takes the clocks to come down to what they are under load.
    """
    for run in runs.values():
        run()
    if device.type != "cuda":
        return {name: min(_timed(run) for _ in range(_RUNS_ON_CPU)) for name, run in runs.items()}
    graph = torch.cuda.CUDAGraph()
    marks = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(len(runs) + 1)]
    with torch.cuda.graph(graph):
        marks[0].record()
        for run, mark in zip(runs.values(), marks[1:], strict=True):
            run()
            mark.record()

    def replayed() -> list[float]:
        graph.replay()
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]

    began, taken = time.perf_counter(), [replayed()]
    while len(taken) < _REPLAYS or time.perf_counter() - began < _LOAD_SECONDS:
        taken.append(replayed())
    return {name: statistics.median(column) for name, column in zip(runs, zip(*taken[len(taken) // 2 :], strict=True),
                                                                   strict=True)}


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _head(outline: Outline, batch: Batch, device: torch.device, dtype: torch.dtype,
          head: Tensor | None) -> Callable[[], object]:
    if head is None:
        head = torch.randn(outline.vocabulary, outline.hidden, device=device, dtype=dtype)
    weight = head.detach()
    hidden = torch.randn(batch.labelled, outline.hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(outline.vocabulary, (batch.labelled,), device=device)
    return lambda: linear_cross_entropy(hidden, weight, targets).backward()


def _copy(device: torch.device) -> Callable[[], object]:
    """A copy from pinned host memory to a GPU."""
    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    return lambda: there.copy_(host, non_blocking=True)


def _random_layer(kind: LayerOutline, device: torch.device, dtype: torch.dtype, precision: str) -> Layer:
    spec = kind.spec
    shapes = ((spec.qkv_size, spec.hidden), (spec.hidden, spec.q_size), (2 * spec.intermediate, spec.hidden),
              (spec.hidden, spec.intermediate))
    scratch = Scratch()
    projections: list[Projection] = []
    for slot, ((N, K), R) in enumerate(zip(shapes, kind.borders, strict=True)):
        adapter = None
        if R:
            a, b = (torch.randn(shape, device=device).mul_(0.01).requires_grad_() for shape in ((R, K), (N, R)))
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)  # gathered there, as in training
            adapter = Adapter(a, b, 1.0)
        weight = _random_weight(kind.storage, N, K, device, dtype)
        if kind.gradients and not R and isinstance(weight, Dense):
            weight.weight.requires_grad_()
        projections.append(make_projection([Linear(weight, adapter=adapter)], scratch, slot, dtype, precision))

    def norm(size: int) -> Tensor:
        return torch.ones(size, device=device, dtype=dtype)

    after = norm(spec.hidden) if spec.post_norms else None
    across = norm(spec.head_dim) if spec.qk_norm else None
    norms = Norms(norm(spec.hidden), norm(spec.hidden), after, after, across, across)
    qkv, o, gate_up, down = projections
    return Layer(spec, norms, qkv, o, gate_up, down, Shared())


def _random_weight(storage: str, N: int, K: int, device: torch.device, dtype: torch.dtype) -> Storage:
    if storage == "nf4":
        blocks = -(-N * K // 64)
        nested = Nested(torch.linspace(-1, 1, 256, device=device), torch.rand(-(-blocks // 256), device=device) / 50,
                        torch.tensor(0.02, device=device), 256)
        return NF4(torch.randint(0, 256, (-(-N * K // 2),), dtype=torch.uint8, device=device),
                   torch.linspace(-1, 1, 16, device=device),
                   torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device), nested, 64, (N, K), dtype)
    if storage == "int8":
        return Int8(torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device), torch.rand(N, device=device))
    return Dense(torch.randn(N, K, device=device, dtype=dtype).mul_(K**-0.5))
