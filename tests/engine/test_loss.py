"""The loss made in chunks against torch's own on all logits at once."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gazelle.engine import loss as module
from gazelle.engine.loss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
n, H, V = 23, 12, 57


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
                      for shape in ((n, H), (V, H)))
    targets = torch.randint(0, V, (n,), generator=generator)
    targets[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, softcap: float | None = None,
          label_smoothing: float = 0.0) -> Tensor:
    logits = scale * (hidden @ weight.t())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("rows", [1, 5, n, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_equals_the_cross_entropy_of_all_logits(scale: float, softcap: float | None, smoothing: float, rows: int,
                                                device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * V * dtype.itemsize)
    hidden, weight, targets = inputs(dtype, device)
    got = linear_cross_entropy(hidden, weight, targets, scale=scale, softcap=softcap, label_smoothing=smoothing)
    grads = torch.autograd.grad(got * 3, (hidden, weight))
    hidden, weight, targets = inputs()
    want = plain(hidden, weight, targets, scale, softcap, smoothing)
    wanted = torch.autograd.grad(want * 3, (hidden, weight))
    tolerance = 1e-12 if device == "cpu" else 2e-3  # products of a GPU may be in TF32
    assert got.dtype == dtype
    for ours, theirs in zip((got, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)


def test_chunks_are_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = module.cross_entropy_
    monkeypatch.setattr(module, "cross_entropy_", lambda logits, *rest: seen.append(len(logits)) or original(
        logits, *rest))
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * V * 8 + 1)
    linear_cross_entropy(*inputs())
    assert seen == [10, 10, 3]
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    linear_cross_entropy(*inputs())
    assert seen[3:] == [1] * n


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_what_is_trained_gets_a_gradient(wanted: str) -> None:
    hidden, weight, targets = inputs()
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (wanted != "none")
    if wanted != "none":
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (wanted == "hidden", wanted == "weight")


def test_sixteen_bits() -> None:
    """Sums are made in float32, and a gradient comes in its parameter's type."""
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    want = plain(*exact, targets)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-3)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() <= 1e-2 * theirs.grad.norm()


def test_a_head_in_another_type() -> None:
    hidden, weight, targets = inputs(torch.float64)
    narrow = weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden, narrow, targets)
    loss.backward()
    assert narrow.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-6)


def test_nothing_to_learn() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()
    hidden.grad = weight.grad = None
    linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).backward()
    assert not weight.grad.any() and not hidden.grad.any()


def test_autocast_does_not_reach_inside() -> None:
    hidden, weight, targets = inputs(torch.float32)
    want = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), want)


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("zeros_like", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(module.torch, name, lambda *args, _of=original, **options: made.append(1) or _of(*args,
                                                                                                             **options))
    want = linear_cross_entropy(*inputs())
    assert made
    made.clear()
    with torch.no_grad():
        hidden, weight, targets = inputs()
        assert torch.equal(linear_cross_entropy(hidden.detach(), weight, targets), want)
    assert not made
