"""Losses and the gradient left in place of the logits against torch's own cross entropy and autograd in float64."""

import pytest
import torch
from torch.nn import functional

from gazelle.kernels import cross_entropy, cross_entropy_triton

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(cross_entropy, "cpu", id="reference"),
        pytest.param(cross_entropy_triton, "cpu", id="interpreted",
                     marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(cross_entropy, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, where 1/∞ is meant
ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
OPTIONS = [
    {}, {"scale": 0.3}, {"scale": 2.5}, {"softcap": 30.0}, {"softcap": 2.0}, {"label_smoothing": 0.1},
    {"scale": 0.5, "softcap": 5.0}, {"scale": 2.5, "label_smoothing": 0.3}, {"softcap": 4.0, "label_smoothing": 0.2},
    {"scale": 3.0, "softcap": 4.0, "label_smoothing": 0.1},
]


def inputs(n, V, dtype=torch.float32, device="cpu", spread=3.0):
    """Logits as a view into wider rows, and targets: the first, the last, none, then any."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, V + 5, generator=generator) * spread).to(device, dtype)[:, 2 : V + 2]
    targets = torch.randint(V, (n,), generator=generator)
    targets[: min(n, 3)] = torch.tensor([0, V - 1, -100])[:n]
    return logits, targets.to(device)


def exact(logits, targets, scale=1.0, softcap=None, label_smoothing=0.0):
    """Losses, and the gradient of their sum by autograd, in float64."""
    leaf = logits.detach().double().cpu().requires_grad_()
    z = leaf * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = functional.cross_entropy(z, targets.cpu(), label_smoothing=label_smoothing, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def close(op, got, want):
    """Sums are float32, and the result is rounded once. The interpreter cuts bfloat16 off."""
    cut = 2 if got.dtype == torch.bfloat16 and op is cross_entropy_triton else 1
    atol = min(ROUNDING[got.dtype], 5e-7) * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double().cpu(), want, rtol=cut * ROUNDING[got.dtype], atol=atol)


def check(op, logits, targets, **options):
    whole = logits._base
    before = whole.clone()
    want, grad = exact(logits, targets, **options)
    losses = op.cross_entropy_(logits, targets, **options)
    assert losses.shape == targets.shape
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32)
    close(op, losses, want)
    close(op, logits, grad)
    ignored = targets == -100
    assert (losses[ignored] == 0).all() and (logits[ignored] == 0).all()
    assert torch.equal(whole[:, :2], before[:, :2]) and torch.equal(whole[:, -3:], before[:, -3:])


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient(op, device, options, dtype):
    check(op, *inputs(7, 37, dtype, device), **options)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("n", "V"), [(4, 20011), (3, 8192), (2, 2), (3, 1), (1, 64), (0, 9)])
def test_vocabularies(op, device, n, V):
    """More than a program reads at a time, the last part not full; exactly that; a single word; no row."""
    check(op, *inputs(n, V, device=device))
    check(op, *inputs(n, V, device=device), scale=0.7, softcap=6.0, label_smoothing=0.1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64(options):
    check(cross_entropy, *inputs(7, 37, torch.float64), **options)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("spread", [1e-3, 100.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_any_size(op, device, spread, shift, smoothing):
    """Nothing overflows. A float32 logit of 10⁴ is itself known to 10⁻³, and so is the logarithm of the sum."""
    logits, targets = inputs(7, 37, device=device, spread=spread)
    logits += shift
    step = 2**-23 * max(1.0, logits.abs().max().item())
    want, grad = exact(logits, targets, label_smoothing=smoothing)
    losses = op.cross_entropy_(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(losses.double().cpu(), want, rtol=1e-6, atol=2 * step)
    torch.testing.assert_close(logits.double().cpu(), grad, rtol=5e-6 + 2 * step, atol=1e-7)


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_words_that_cannot_be(op, device):
    """A logit of -∞ has no probability and no gradient, wherever it stands."""
    logits, targets = inputs(7, 37, device=device)
    targets[:2] = 5
    logits[0, 9] = logits[1, :4] = logits[3, 36] = -torch.inf
    targets[3] = 1
    check(op, logits, targets)


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_nothing_is_learnt(op, device):
    logits, targets = inputs(5, 37, device=device)
    targets[:] = -100
    assert (op.cross_entropy_(logits, targets, 0.5, 3.0, 0.1) == 0).all() and (logits == 0).all()


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_gradients_of_a_row_add_up_to_nothing(op, device):
    """More of every logit is no change."""
    logits, targets = inputs(7, 1000, device=device)
    op.cross_entropy_(logits, targets, 2.0, None, 0.1)
    assert (logits.double().sum(1).abs() < 1e-5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("V", [49152, 128256, 151936])
@pytest.mark.parametrize("options", [{}, {"scale": 0.0625, "softcap": 30.0, "label_smoothing": 0.1}], ids=str)
def test_real_vocabularies_natively(V, options):
    check(cross_entropy, *inputs(33, V, torch.bfloat16, "cuda"), **options)
