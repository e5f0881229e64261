"""Four-bit weights: bit-equal to bitsandbytes' own dequantisation, in any shape, and the same in e4m3."""

import pytest
import torch
from bitsandbytes import functional

from gazelle.kernels import nf4, nf4_triton
from gazelle.kernels.nf4 import Nested

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = nf4_triton.Launch(8, 1, depth=2)  # the interpreter takes its time
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Whole blocks a row; rows that begin inside a block; inside a word; inside a byte; a single column.
SHAPES = [(24, 128), (16, 8), (6, 200), (7, 72), (5, 100), (3, 35), (5, 1)]


def quantised(shape, kind="nf4", nested=True, dtype=torch.float32, device="cpu", block=64):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)


def arguments(packed, state):
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return packed.flatten(), state.code, state.absmax, nested, state.blocksize


def corner(shape, dtype, device="cpu"):
    """A view into a wider matrix, and what lies around it."""
    whole = torch.full((shape[0] + 8, shape[1] + 8 + -shape[1] % 8), 7.0, dtype=dtype, device=device)
    return whole[: shape[0], : shape[1]], (whole[shape[0] :], whole[:, shape[1] :])


def rounded(exact, dtype, implementation):
    """float32 numbers in `dtype`. Triton's interpreter cuts bfloat16 off."""
    if implementation == "triton" and dtype == torch.bfloat16:
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype)


def run(implementation, packed, state, out, row_scales=None, transposed=False, launch=SMALL):
    if implementation == "triton":
        return nf4_triton.dequantize(*arguments(packed, state), out, row_scales, transposed=transposed, launch=launch)
    if transposed:
        return nf4.dequantize_transposed(*arguments(packed, state), out, row_scales)
    return nf4.dequantize(*arguments(packed, state), out, row_scales)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bit_equal_to_bitsandbytes(implementation, dtype, nested, kind):
    packed, state = quantised((24, 128), kind, nested, dtype)
    out, around = corner((24, 128), dtype)
    assert run(implementation, packed, state, out) is out
    if implementation == "reference":
        assert torch.equal(out, functional.dequantize_4bit(packed, state))
    state.dtype = torch.float32
    assert torch.equal(out, rounded(functional.dequantize_4bit(packed, state), dtype, implementation))
    assert all((border == 7).all() for border in around)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(implementation, shape):
    packed, state = quantised(shape, nested=False)
    out, around = corner(shape, torch.bfloat16)
    run(implementation, packed, state, out)
    # A product of two float32 is exact in float64.
    index = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()[: out.numel()].long()
    exact = state.code.double()[index] * state.absmax.double().repeat_interleave(64)[: out.numel()]
    assert torch.equal(out, rounded(exact.view(shape).float(), torch.bfloat16, implementation))
    assert all((border == 7).all() for border in around)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("block", [32, 128, 4096])
def test_blocks_of_other_sizes(implementation, block):
    packed, state = quantised((8, 520), nested=block != 4096, block=block)
    out = run(implementation, packed, state, torch.empty(8, 520))
    scales = nf4.scales(state.absmax, arguments(packed, state)[3])
    assert torch.equal(out, functional.dequantize_4bit(packed, functional.QuantState(
        scales, state.shape, state.code, block, "nf4", torch.float32)))


@pytest.mark.parametrize("nested", [True, False])
def test_the_reference_goes_in_pieces(nested, monkeypatch):
    packed, state = quantised((50, 72), nested=nested)
    whole = nf4.dequantize(*arguments(packed, state), torch.empty(50, 72))
    monkeypatch.setattr(nf4, "_CHUNK", 600)
    assert torch.equal(nf4.dequantize(*arguments(packed, state), torch.empty(50, 72)), whole)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(24, 128), (7, 72), (5, 36)])
def test_in_fp8(implementation, transposed, shape):
    # The interpreter rounds to e4m3 wrongly, so every product is made to fit: powers of two times codes of few bits.
    packed, state = quantised(shape, nested=False)
    state.code = torch.tensor([-448.0, -416, -60, -26, -9, -1.5, -0.25, 0, 0.125, 2, 11, 30, 72, 320, 384, 448]) / 2**9
    state.absmax = torch.ldexp(torch.ones_like(state.absmax), torch.arange(len(state.absmax)) % 3 - 1)
    scales = torch.ldexp(torch.ones(shape[0]), torch.arange(shape[0]) % 4 - 8)
    out, around = corner(shape[::-1] if transposed else shape, torch.float8_e4m3fn)
    run(implementation, packed, state, out, scales, transposed)
    exact = functional.QuantState(state.absmax, state.shape, state.code, 64, "nf4", torch.float32)
    exact = nf4.dequantize(*arguments(packed, exact), torch.empty(shape)) / scales[:, None]
    exact = exact.clamp(-448, 448)
    got = out.float().t() if transposed else out.float()
    if implementation == "triton" and not torch.cuda.is_available():
        inside = exact.abs() < 448  # nor does it saturate
        assert inside.float().mean() > 0.5 and torch.equal(got[inside], exact[inside])
    else:
        assert torch.equal(got, exact)
    assert all((border.float() == 7).all() for border in around)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(24, 128), (7, 72), (3, 35), (130, 8)])
def test_row_amax_is_reached_but_not_exceeded(nested, shape):
    packed, state = quantised(shape, nested=nested)
    found = nf4.row_amax(state.absmax, arguments(packed, state)[3], 64, shape)
    amax = nf4.dequantize(*arguments(packed, state), torch.empty(shape)).abs().amax(1)
    assert (found >= amax).all()
    if shape[1] % 64 == 0:
        assert torch.equal(found, amax)


NATIVE = [(512, 1024), (100, 576), (9, 200), (9, 100)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "dtype", "launch"), [
    *((shape, dtype, None) for shape in NATIVE for dtype in DTYPES),
    *((NATIVE[1], torch.bfloat16, launch) for launch in nf4_triton.LAUNCHES.values()),
])
def test_native(shape, dtype, launch, nested, kind):
    packed, state = quantised(shape, kind, nested, dtype, "cuda")
    out, around = corner(shape, dtype, "cuda")
    run("triton", packed, state, out, launch=launch)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))
    assert all((border == 7).all() for border in around)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "launch"), [
    *((shape, None) for shape in NATIVE), *((NATIVE[1], launch) for launch in nf4_triton.TRANSPOSED_LAUNCHES.values()),
])
def test_native_fp8(shape, launch, nested):
    packed, state = quantised(shape, nested=nested, device="cuda")
    scales = nf4.row_amax(state.absmax, arguments(packed, state)[3], 64, shape) / 448
    rows = run("triton", packed, state, torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda"), scales,
               launch=None)
    columns = torch.empty(shape[::-1], dtype=torch.float8_e4m3fn, device="cuda")
    run("triton", packed, state, columns, scales, transposed=True, launch=launch)
    state.to("cpu")
    want = run("reference", packed.cpu(), state, torch.empty(shape, dtype=torch.float8_e4m3fn), scales.cpu())
    assert torch.equal(rows.cpu().view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(columns.cpu().t().contiguous().view(torch.uint8), want.view(torch.uint8))
