"""RMS norm, its gradients and its weight's against float64 and Hugging Face's modules."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gazelle.kernels import norm, norm_triton

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(norm, "cpu", id="reference"),
        pytest.param(norm_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(norm, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Several rows a program and a last one that is not full; one row a program; heads; a single one; no row.
SHAPES = [(70, 19), (3, 64), (2, 5000), (9, 3, 24), (1, 2), (0, 16), (0, 3, 16)]
EPS = 1e-5


def inputs(shape, dtype=torch.float32, device="cpu"):
    """x and dy as views into wider rows (of heads: into queries, keys and values), and a weight. One row is tiny, one
    is zero, so that `eps` counts."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (spread(shape, dtype, device, generator, apart) for apart in (5, 9))
    if shape[0] > 2:
        x[0] *= 1e-3
        x[1] = 0
    return x, dy, torch.randn(shape[-1], generator=generator).to(device, dtype)


def spread(shape, dtype, device, generator, apart):
    """Random numbers whose rows lie so many elements apart."""
    width = torch.Size(shape[1:]).numel()
    whole = torch.randn(shape[0], width + apart, generator=generator).to(device, dtype)
    return whole[:, 2 : width + 2].unflatten(1, shape[1:])


def exact(x, weight, offset):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * (weight + offset)


def gradients(x, dy, weight, offset):
    """Of x and the weight, by autograd in float64."""
    leaves = [t.double().cpu().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(exact(*leaves, offset), leaves, dy.double().cpu())


def close(op, got, want):
    """Sums are float32, and the result is rounded once. The interpreter cuts bfloat16 off."""
    cut = 2 if got.dtype == torch.bfloat16 and op is norm_triton else 1
    atol = min(ROUNDING[got.dtype], 1e-6) * (want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double().cpu(), want, rtol=cut * ROUNDING[got.dtype], atol=atol)


def rstd_of(x):
    wide = x.double()
    rstd = torch.rsqrt((wide * wide).mean(-1) + EPS)
    return rstd if x.dtype == torch.float64 else rstd.float()


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_forward(op, device, shape, offset):
    x, _, weight = inputs(shape, device=device)
    y, rstd = op.rms_norm(x, weight, EPS, offset)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert rstd.shape == x.shape[:-1] and rstd.dtype == torch.float32
    close(op, y, exact(x.double().cpu(), weight.double().cpu(), offset))
    close(op, rstd, rstd_of(x.cpu()).double())


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_backward(op, device, shape, offset):
    x, dy, weight = inputs(shape, device=device)
    dx = op.rms_norm_backward(dy, x, weight, rstd_of(x), offset)
    want, want_weight = gradients(x, dy, weight, offset)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    close(op, dx, want)
    dw = op.rms_norm_weight_grad(dy, x, rstd_of(x))
    assert dw.dtype == torch.float32
    close(op, dw, want_weight)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 19), (9, 3, 24)])
def test_in_sixteen_bits(op, device, dtype, shape):
    """Rounded once, at the end; the weight may be float32."""
    x, dy, weight = inputs(shape, dtype, device)
    weight = weight.float() + 2**-12
    y, rstd = op.rms_norm(x, weight, EPS, 1.0)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    close(op, y, exact(x.double().cpu(), weight.double().cpu(), 1.0))
    dx = op.rms_norm_backward(dy, x, weight, rstd, 1.0)
    want, want_weight = gradients(x, dy, weight, 1.0)
    assert dx.dtype == dtype
    close(op, dx, want)
    dw = op.rms_norm_weight_grad(dy, x, rstd)
    assert dw.dtype == torch.float32
    close(op, dw, want_weight)


def test_in_float64():
    x, dy, weight = inputs((7, 19), torch.float64)
    y, rstd = norm.rms_norm(x, weight, EPS, 1.0)
    assert rstd.dtype == torch.float64
    close(norm, y, exact(x, weight, 1.0))
    want, want_weight = gradients(x, dy, weight, 1.0)
    close(norm, norm.rms_norm_backward(dy, x, weight, rstd, 1.0), want)
    close(norm, norm.rms_norm_weight_grad(dy, x, rstd), want_weight)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 19), (5, 3, 24)])
def test_into_a_view(op, device, dtype, shape):
    """Into the first columns of wider rows, whose border stays as it is; over the input itself; other types."""
    x, dy, weight = inputs(shape, dtype, device)
    width = torch.Size(shape[1:]).numel()
    whole = torch.full((shape[0] + 1, width + 5), 7.0, dtype=dtype, device=device)
    out = whole[:-1, :width].unflatten(1, shape[1:])
    want = exact(x.double().cpu(), weight.double().cpu(), 0.0)
    got, rstd = op.rms_norm(x, weight, EPS, out=out)
    assert got is out
    close(op, out, want)
    dx = gradients(x, dy, weight, 0.0)[0]
    assert op.rms_norm_backward(dy, x, weight, rstd, out=out) is out
    close(op, out, dx)
    assert (whole[-1] == 7).all() and (whole[:, width:] == 7).all()
    over = dy.clone()
    op.rms_norm_backward(over, x, weight, rstd, out=over)
    close(op, over, dx)
    wide = op.rms_norm(x, weight, EPS, out=torch.empty(shape, device=device))[0]
    close(op, wide, want)
    op.rms_norm(x, weight, EPS, out=x)
    close(op, x, want)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 19), (9, 3, 24)])
def test_with_a_residual(op, device, dtype, shape):
    """Apart from where the sum goes, and in the same place."""
    x, dy, weight = inputs(shape, dtype, device)
    residual = spread(shape, dtype, device, torch.Generator().manual_seed(1), 7)
    before = residual.clone()
    want = gradients(x, dy, weight, 1.0)[0] + residual.double().cpu()
    close(op, op.rms_norm_backward(dy, x, weight, rstd_of(x), 1.0, residual), want)
    assert torch.equal(residual, before)
    assert op.rms_norm_backward(dy, x, weight, rstd_of(x), 1.0, residual, out=residual) is residual
    close(op, residual, want)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("shape", [(5000, 3), (40, 300)])
def test_weight_gradients_of_many_rows_repeat(op, device, shape):
    """More rows than first-stage sums of one block, and more columns than a program takes."""
    x, dy, weight = inputs(shape, device=device)
    first, second = (op.rms_norm_weight_grad(dy, x, rstd_of(x)) for _ in range(2))
    close(op, first, gradients(x, dy, weight, 0.0)[1])
    assert torch.equal(first, second)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_equals_hugging_face(op, device, kind, offset):
    module = kind(64, eps=EPS).to(device)
    x, dy, weight = inputs((9, 64), device=device)
    x, dy = x.contiguous().requires_grad_(), dy.contiguous()
    module.weight.data.copy_(weight)
    want = module(x)
    dx, dw = torch.autograd.grad(want, (x, module.weight), dy)
    y, rstd = op.rms_norm(x.detach(), weight, EPS, offset)
    close(op, y, want.detach().double().cpu())
    close(op, op.rms_norm_backward(dy, x.detach(), weight, rstd, offset), dx.double().cpu())
    close(op, op.rms_norm_weight_grad(dy, x.detach(), rstd), dw.double().cpu())
