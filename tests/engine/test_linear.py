"""Linears run as one bordered product against each alone in float64: outputs and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gazelle.engine.dropout import dropped
from gazelle.engine.linear import Adapter, Gradients, Linear, Projection
from gazelle.engine.linear_cpu import CpuProjection
from gazelle.engine.scratch import Scratch
from gazelle.quantize.storage import Dense

pytestmark = pytest.mark.usefixtures("one_thread")
T, K = 9, 20
# Outputs, adapter's rank (0 for none), bias and trained weight of each part.
CASES: dict[str, list[tuple[int, int, bool, bool]]] = {
    "one": [(12, 4, False, False)],
    "three": [(12, 4, True, False), (8, 4, False, False), (8, 4, True, False)],
    "ranks": [(12, 1, False, False), (8, 7, False, False)],
    "first without": [(12, 0, True, False), (8, 3, False, False)],
    "middle without": [(12, 2, False, False), (8, 0, False, False), (4, 3, False, False)],
    "last without": [(12, 3, False, False), (8, 0, True, False)],
    "none": [(12, 0, False, False), (8, 0, True, False)],
    "trained": [(12, 0, True, True), (8, 0, False, True)],
    "one of two trained": [(12, 0, True, False), (8, 0, False, True)],
    "all at once": [(12, 2, True, True), (8, 3, True, True)],
}
SCALES = (1.0, 0.5, 3.0)


def linears(case: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> list[Linear]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, trained: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

    parts = []
    for (N, r, bias, trained), scale in zip(CASES[case], SCALES, strict=False):
        adapter = Adapter(draw(r, K), draw(N, r), scale, dropout) if r else None
        parts.append(Linear(Dense(draw(N, K, trained=trained)), draw(N) if bias else None, adapter))
    return parts


def plain(parts: list[Linear], x: Tensor, residual: Tensor | None, seed: Tensor | None) -> Tensor:
    """What PEFT computes."""
    outputs = []
    for number, part in enumerate(parts):
        y = torch.nn.functional.linear(x, part.weight.weight, part.bias)
        if (adapter := part.adapter) is not None:
            kept = x if seed is None else dropped(x, adapter.dropout, seed, number)
            y = y + adapter.scale * (kept @ adapter.a.t() @ adapter.b.t())
        outputs.append(y)
    y = torch.cat(outputs, 1)
    return y if residual is None else y + residual


def run(parts: list[Linear], x: Tensor, dy: Tensor, *, residual: Tensor | None = None, seed: Tensor | None = None,
        keep_z: bool = True, kind: type[Projection] = Projection) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Output, the gradient of x, and those of the parameters by id."""
    projection = kind(parts, Scratch(), 0, x.dtype)
    entry = projection.enter(x)
    y, z = projection.forward(entry, projection.matrix(), residual=residual, seed=seed)
    if residual is None:
        wide, again = projection.forward_wide(entry, projection.matrix(), seed=seed)
        assert wide.shape == projection.output(len(x)).shape
        tolerance = 1e-13 if x.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(wide[:, : projection.N], y, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(again, z, rtol=tolerance, atol=tolerance)
    assert (z is None) == (projection.R == 0)
    W = projection.matrix(again=True)
    d = projection.output(len(x))
    d[:, : projection.N] = dy
    dx = projection.input_gradient(d, W, seed)
    grads = Gradients(list(projection.trainable()))
    projection.parameter_gradients(d, entry[:, :K], W, z if keep_z else None, grads, seed)
    return y, dx, {id(tensor): found for tensor in projection.trainable() if (found := grads.of(tensor)) is not None}


@pytest.mark.parametrize("keep_z", [True, False], ids=["z kept", "z again"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("add", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [Projection, CpuProjection])
def test_equals_each_part_alone(kind: type[Projection], case: str, add: bool, dropout: float, keep_z: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    N = sum(part[0] for part in CASES[case])
    x, dy, more = (torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (K, N, N))
    seed = torch.tensor([5]) if dropout else None
    parts = linears(case, dropout=dropout)
    leaf = x.clone().requires_grad_()
    residual = more if add else None
    want = plain(parts, leaf, residual, seed)
    tensors = [tensor for part in parts for tensor in (part.weight.weight, part.bias, *(
        (part.adapter.a, part.adapter.b) if part.adapter else ())) if tensor is not None and tensor.requires_grad]
    dx, *grads = torch.autograd.grad(want, [leaf, *tensors], dy)
    want = want.detach()
    y, got, found = run(parts, x, dy, residual=residual, seed=seed, keep_z=keep_z, kind=kind)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, dx, rtol=1e-12, atol=1e-12)
    assert len(found) == len(tensors)
    for tensor, grad in zip(tensors, grads, strict=True):
        assert found[id(tensor)].shape == tensor.shape
        torch.testing.assert_close(found[id(tensor)], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_cpu_in_float32(case: str) -> None:
    """Weights written to scratch memory at each use, too."""
    generator = torch.Generator().manual_seed(1)
    N = sum(part[0] for part in CASES[case])
    x, dy = (torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (K, N))
    parts = linears(case)
    y, dx, grads = run(parts, x, dy)
    for dtype in (torch.float32, torch.float64):
        narrow = [Linear(Dense(part.weight.weight.detach().to(dtype)), part.bias, part.adapter) for part in parts]
        got = run(narrow, x.float(), dy.float(), kind=CpuProjection)
        torch.testing.assert_close(got[:2], (y.float(), dx.float()), rtol=1e-5, atol=1e-4)
        for name, grad in got[2].items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [Projection, CpuProjection])
def test_output_in_place(kind: type[Projection]) -> None:
    parts = linears("three")
    projection = kind(parts, Scratch(), 0, torch.float64)
    entry = projection.enter(torch.linspace(-1, 1, T * K, dtype=torch.float64).view(T, K))
    wide = projection.output(T)
    y, _ = projection.forward(entry, projection.matrix(), out=wide[:, : projection.N])
    assert y.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(y, plain(parts, entry[:, :K], None, None).detach())


@pytest.mark.parametrize("kind", [Projection, CpuProjection])
def test_dense_weights_become_views_of_one_matrix(kind: type[Projection]) -> None:
    parts = linears("three")
    before = [part.weight.weight.detach().clone() for part in parts]
    projection = kind(parts, Scratch(), 0, torch.float64)
    storages = {part.weight.weight.untyped_storage().data_ptr() for part in parts}
    assert len(storages) == 1
    assert all(torch.equal(part.weight.weight, weight) for part, weight in zip(parts, before, strict=True))
    assert projection.scratch.nbytes == 0
    with torch.no_grad():
        parts[1].weight.weight.mul_(2)  # an optimizer's step is seen
    assert torch.equal(projection.matrix().whole[12:20, :K], parts[1].weight.weight)


def test_changed_factors_are_used_at_the_next_pass() -> None:
    parts = linears("three")
    projection = Projection(parts, Scratch(), 0, torch.float64)
    projection.matrix()
    adapter: Any = parts[1].adapter
    with torch.no_grad():
        adapter.a.mul_(2)
        adapter.b.add_(1)
    W = projection.matrix()
    rows, columns = projection.spans[1]
    torch.testing.assert_close(W.a[columns], adapter.a.detach())
    torch.testing.assert_close(W.b[rows, columns], adapter.b.detach() * adapter.scale)


def test_weights_of_another_type_are_written_to_scratch() -> None:
    """As quantised ones are: two projections share the memory of one."""
    scratch = Scratch()
    first, second = ([Linear(Dense(part.weight.weight.detach().float()), None, part.adapter)
                      for part in linears(case, torch.float64)] for case in ("three", "ranks"))
    a, b = (Projection(parts, scratch, 0, torch.float64) for parts in (first, second))
    other = Projection(first, scratch, 1, torch.float64)
    kept = other.matrix().whole.clone()
    assert a.kept is None
    whole = a.matrix().whole
    assert torch.equal(whole[:12, :K], first[0].weight.weight.double())
    again = b.matrix(again=True).whole  # of other weights and factors: all of it is written
    assert again.data_ptr() == whole.data_ptr()
    _, columns = b.spans[1]
    torch.testing.assert_close(again[b.N :, :K][columns], second[1].adapter.a.detach())
    assert not again[: b.N, K:][:12, columns].any()
    assert torch.equal(other.matrix().whole, kept)
    assert a.scratch.nbytes == 8 * (whole.numel() + kept.numel())


@pytest.mark.parametrize("case", [case for case, parts in CASES.items() if any(part[1] for part in parts)])
def test_nobodys_corners_are_zero(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where adapter columns are padded, as on a GPU, and beside adapters, whatever memory held before."""
    monkeypatch.setattr("gazelle.engine.linear._ALIGN", {"cpu": 16})
    generator = torch.Generator().manual_seed(1)
    parts = linears(case)
    N = sum(part[0] for part in CASES[case])
    x, dy = (torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (K, N))
    leaf = x.clone().requires_grad_()
    want = plain(parts, leaf, None, None)
    dx = torch.autograd.grad(want, leaf, dy)[0]
    for parts_now in (parts, [Linear(Dense(part.weight.weight.detach().float()), part.bias, part.adapter)
                              for part in parts]):
        scratch = Scratch()
        scratch.matrix(100, 100, torch.float64, x.device).fill_(float("nan"))
        projection = Projection(parts_now, scratch, 0, torch.float64)
        assert projection.R == 16
        entry, d = projection.input(T), projection.output(T)
        entry[:, :K], d[:, :N] = x, dy
        y, _ = projection.forward(entry, projection.matrix())
        tolerance = 1e-12 if projection.kept is not None else 1e-5
        torch.testing.assert_close(y, want.detach(), rtol=tolerance, atol=tolerance)
        got = projection.input_gradient(d, projection.matrix(again=True))
        torch.testing.assert_close(got, dx, rtol=tolerance, atol=tolerance)


def test_gradients_of_a_tensor_used_twice_add_up() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    grads = Gradients([tensor])
    grads.add(tensor, torch.ones(3, dtype=torch.float64))
    grads.add(tensor, torch.ones(3, dtype=torch.float64))
    assert grads.of(tensor).dtype == torch.float32
    assert torch.equal(grads.of(tensor), torch.full((3,), 2.0))
    assert not grads.wants(torch.zeros(3))
    assert not grads.wants(None)
    assert grads.of(torch.zeros(3)) is None
