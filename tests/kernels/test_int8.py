"""Eight-bit weights: bit-equal to bitsandbytes' own dequantisation, and the same in e4m3."""

import pytest
import torch
from bitsandbytes import functional

from gazelle.kernels import int8, int8_triton

DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantised(shape, device="cpu"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    return [x.to(device) for x in functional.int8_vectorwise_quant(weight)[:2]]


def run(implementation, weight, absmax, out, row_scales=None, transposed=False):
    if implementation == "triton":
        return int8_triton.dequantize(weight, absmax, out, row_scales, transposed=transposed)
    if transposed:
        return int8.dequantize_transposed(weight, absmax, out, row_scales)
    return int8.dequantize(weight, absmax, out, row_scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 64), (3, 35), (2, 1040)])
def test_bit_equal_to_bitsandbytes(implementation, dtype, shape, device):
    weight, absmax = quantised(shape, device)
    whole = torch.full((shape[0] + 1, shape[1] + 8), 7.0, dtype=dtype, device=device)
    out = whole[: shape[0], : shape[1]]
    assert run(implementation, weight, absmax, out) is out
    want = functional.int8_vectorwise_dequant(weight, absmax)
    if implementation == "triton" and device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts it off
        want = (want.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(out, want.to(dtype))
    assert (whole[shape[0] :] == 7).all() and (whole[:, shape[1] :] == 7).all()


def test_the_reference_goes_in_pieces(monkeypatch):
    monkeypatch.setattr(int8, "_CHUNK", 200)
    weight, absmax = quantised((9, 64))
    out = int8.dequantize(weight, absmax, torch.empty(9, 64))
    assert torch.equal(out, functional.int8_vectorwise_dequant(weight, absmax))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(9, 64), (130, 72)])
def test_in_fp8(implementation, transposed, shape, device):
    weight, absmax = quantised(shape, device)
    scales = absmax / 448
    out = torch.empty(shape[::-1] if transposed else shape, dtype=torch.float8_e4m3fn, device=device)
    run(implementation, weight, absmax, out, scales, transposed)
    exact = weight.double() * (absmax.double() / 127)[:, None] / scales.double()[:, None]
    got = (out.t() if transposed else out).double()
    # Half a step of three bits; the interpreter rounds to e4m3 wrongly, and what it got wrong is off by up to a half.
    tolerance = 1.0 if implementation == "triton" and device == "cpu" else 2**-4 + 1e-6
    assert ((got - exact).abs() <= tolerance * exact.abs() + 2**-10).all()
    assert ((got - exact).abs() <= 2**-3 * exact.abs() + 2**-10).double().mean() > 0.7
