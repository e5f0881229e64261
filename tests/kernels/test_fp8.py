"""Rows in e4m3 and their products against float64, and the GPU's kernels against the reference bit for bit."""

import pytest
import torch

from gazelle.kernels import fp8, fp8_triton

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def grid(shape, seed=0):
    """Numbers that e4m3 holds, ±448 in every row: what Triton's interpreter, which rounds wrongly, gets right too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    x[:, shape[1] // 2] = 448 * (1 - 2 * (torch.arange(shape[0]) % 2))
    return x


def powers(count):
    """Scales that change no digit."""
    return torch.ldexp(torch.ones(count), torch.arange(count) % 5 - 3)


def bits(x):
    return x.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("implementation", [fp8, fp8_triton])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("block", [16384, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_rows(implementation, columns, block, dtype, monkeypatch):
    monkeypatch.setattr(fp8_triton, "_BLOCK", block)  # rows that do not fit are read twice
    want, scale, factors = grid((7, 83)), powers(7)[:, None], powers(83)
    x = want * scale
    if columns:
        x = x / factors
    wide = torch.full((7, 96), 1e6, dtype=dtype)
    wide[:, :83] = x
    eight, got = implementation.quantize_rows(wide[:, :83], factors if columns else None)
    assert eight.dtype == torch.float8_e4m3fn and eight.is_contiguous() and eight.shape == (7, 83)
    assert got.dtype == torch.float32 and torch.equal(got, scale)
    assert torch.equal(eight.float(), want)


@pytest.mark.parametrize("implementation", [fp8, fp8_triton])
def test_rows_of_zeros(implementation):
    eight, scale = implementation.quantize_rows(torch.zeros(3, 16))
    assert (scale > 0).all() and (eight.float() == 0).all()


def test_rounding_is_to_the_nearest():
    x = torch.randn(64, 300, dtype=torch.float64)
    eight, scale = fp8.quantize_rows(x.float())
    error = (eight.double() * scale - x).abs()
    assert (error <= 2**-4 * x.abs() * (1 + 1e-6) + 2**-10 * scale).all()
    assert torch.equal(scale.double(), (x.float().abs().amax(1, keepdim=True) / 448).double())


def test_too_large_saturates_and_nan_stays():
    eight = fp8.to_fp8(torch.tensor([1e9, -500.0, float("nan"), float("inf")]))
    assert eight.float()[[0, 1, 3]].tolist() == [448, -448, 448] and eight.float()[2].isnan()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 83), (130, 70)])
def test_divide_rows(implementation, transposed, shape):
    want, scales = grid(shape), powers(shape[0])
    out = torch.zeros(shape[transposed] + 1, shape[not transposed] + 5).to(torch.float8_e4m3fn)[:-1, :-5]
    arguments = (want * scales[:, None], scales, out)
    if implementation == "triton":
        fp8_triton.divide_rows(*arguments, transposed=transposed)
    else:
        (fp8.divide_rows_transposed if transposed else fp8.divide_rows)(*arguments)
    assert torch.equal((out.t() if transposed else out).float(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_mm(dtype):
    a, b = grid((5, 32)), grid((16, 32), 1)
    scale_a, scale_b = torch.rand(5, 1) / 448, torch.rand(16) / 448
    got = fp8.scaled_mm(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), scale_a, scale_b, dtype)
    exact = (a.double() * scale_a) @ (b.double() * scale_b[:, None]).t()
    assert got.dtype == dtype
    atol = 2e-6 * exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_forward_and_backward_of_a_linear_layer():
    x, w, dy = (torch.randn(shape, dtype=torch.float64) for shape in ((32, 64), (48, 64), (32, 48)))
    scales = fp8.scale_of(w.abs().amax(1))
    eight = torch.empty(48, 64, dtype=torch.float8_e4m3fn)
    turned = torch.empty(64, 48, dtype=torch.float8_e4m3fn)
    fp8.divide_rows(w, scales, eight)
    fp8.divide_rows_transposed(w, scales, turned)
    inner, inner_scale = fp8.quantize_rows(x)
    y = fp8.scaled_mm(inner, eight, inner_scale, scales, torch.float32)
    outer, outer_scale = fp8.quantize_rows(dy, scales)
    dx = fp8.scaled_mm(outer, turned, outer_scale, torch.ones(64), torch.float32)
    for got, exact in ((y, x @ w.t()), (dx, dy @ w)):
        assert (got - exact).norm() <= 0.05 * exact.norm()


def test_a_cpu_has_no_fp8():
    assert not fp8.fp8_supported(torch.device("cpu"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("K", [64, 1000, 4096, 20000])
def test_quantize_rows_natively(K, columns):
    x = torch.randn(33, K + 16).bfloat16()[:, :K]
    factors = torch.rand(K) if columns else None
    want, want_scale = fp8.quantize_rows(x, factors)
    got, scale = fp8.quantize_rows(x.cuda(), None if factors is None else factors.cuda())
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("divide", [fp8.divide_rows, fp8.divide_rows_transposed])
@pytest.mark.parametrize("shape", [(128, 256), (100, 84)])
def test_divide_rows_natively(divide, shape):
    w = torch.randn(shape).bfloat16()
    scales = fp8.scale_of(w.abs().amax(1))
    want = torch.empty(shape if divide is fp8.divide_rows else shape[::-1], dtype=torch.float8_e4m3fn)
    got = torch.empty_like(want, device="cuda")
    assert torch.equal(bits(divide(w.cuda(), scales.cuda(), got)), bits(divide(w, scales, want)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 256, 1024), (33, 48, 64)])
def test_scaled_mm_natively(dtype, shape):
    if not fp8.fp8_supported(torch.device("cuda")):
        pytest.skip("needs fp8")
    M, N, K = shape
    a, scale_a = fp8.quantize_rows(torch.randn(M, K))
    b, scale_b = fp8.quantize_rows(torch.randn(N, K))
    exact = (a.double() * scale_a) @ (b.double() * scale_b).t()
    got = fp8.scaled_mm(a.cuda(), b.cuda(), scale_a.cuda(), scale_b.flatten().cuda(), dtype)
    assert got.dtype == dtype
    assert (got.cpu().double() - exact).norm() <= 5e-3 * exact.norm()
