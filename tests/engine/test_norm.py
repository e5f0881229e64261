"""The norm behind the last layer against autograd."""

import pytest
import torch

from gazelle.engine.norm import final_norm

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("trained", ["both", "input", "weight"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_autograd(offset: float, trained: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 24), (24,), (9, 24))
    x, weight, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    dtype, tolerance = (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 1e-5)
    results = []
    for to, kind in ((device, dtype), ("cpu", torch.float64)):
        a, w = x.to(to, kind), weight.to(to, kind)
        leaves = [leaf.requires_grad_() for leaf, name in ((a, "input"), (w, "weight")) if trained in ("both", name)]
        if not results:
            y = final_norm(a, w, 1e-6, offset)
        else:
            y = a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (w + offset)
        results.append([part.double().cpu() for part in (y.detach(), *torch.autograd.grad(y, leaves, dy.to(to, kind)))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_types_are_kept() -> None:
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    y = final_norm(x, weight, 1e-6)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == weight.grad.dtype == torch.bfloat16
