"""W̃ = [[W, sB], [A, 0]] for several adapters side by side, padded with zeros, against the same laid out by hand."""

import pytest
import torch

from gazelle.kernels import border, border_triton
from gazelle.kernels.factors import Factors

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(border, "cpu", id="reference"),
        pytest.param(border_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(border, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
# (outputs of each part and its rank, none for no adapter; inputs; columns that the border has): no padding; padding
# that is nobody's; a part without an adapter first, between and last; rows and columns beyond one program's.
CASES = [([(13, 3)], 20, 3), ([(13, 3)], 20, 8), ([(8, 4), (5, 2), (3, 2)], 24, 8), ([(8, 4), (5, 1), (3, 2)], 24, 64),
         ([(6, None), (9, 2), (7, None), (5, 3)], 33, 5), ([(9, 2), (7, None)], 17, 6), ([(150, 8), (70, 8)], 1030, 16),
         ([(4, 2), (3, 1), (5, 2), (6, 3)], 20, 10)]


def factors(parts, inputs, dtype, device):
    """(a, b, scale) of each part, b and a as views into longer rows; None without an adapter."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (n, r) in enumerate(parts):
        a, b = (None, None) if r is None else (torch.randn(*shape, generator=generator).to(device, dtype)[:, :-3]
                                               for shape in ((r, inputs + 3), (n, r + 3)))
        found.append(None if r is None else (a, b, 0.3 + number))
    return found


def layout(parts):
    """(rows, columns) of each part."""
    row = column = 0
    for n, r in parts:
        yield slice(row, row + n), slice(column, column + (r or 0))
        row, column = row + n, column + (r or 0)


def by_hand(weight, found, parts, width):
    """W̃ in float64 from a block matrix of all parts."""
    rank = sum(r or 0 for _, r in parts)
    blocks = [torch.zeros(n, 0) if f is None else f[1].double().cpu() * f[2]
              for f, (n, _) in zip(found, parts, strict=True)]
    right = torch.nn.functional.pad(torch.block_diag(*blocks), (0, width - rank))
    down = torch.cat([f[0].double().cpu() for f in found if f is not None])
    down = torch.nn.functional.pad(down, (0, 0, 0, width - rank))
    return torch.cat((torch.cat((weight.double().cpu(), right), 1), torch.nn.functional.pad(down, (0, width))))


def rounded(op, exact, dtype):
    """Products of two float32 in `dtype`. Triton's interpreter cuts bfloat16 off."""
    exact = exact.float()
    if op is border_triton and dtype == torch.bfloat16:
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype)


def fill(op, matrix, found, parts, inputs, width):
    outputs = len(matrix) - width
    places = list(zip(found, layout(parts), strict=True))
    for f, (rows, _) in places:
        if f is None:
            matrix[rows, inputs:] = 0
    fillings = [Factors(*f, rows, columns) for f, (rows, columns) in places if f is not None]
    op.fill_borders(matrix[outputs:, :inputs], matrix[:outputs, inputs:], fillings)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("parts", "inputs", "width"), CASES)
@pytest.mark.parametrize(("dtype", "of_factors"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_every_part(op, device, parts, inputs, width, dtype, of_factors):
    """Whatever stood in the border before; the corner, and what lies around the matrix, is nobody's to touch."""
    outputs = sum(n for n, _ in parts)
    whole = torch.full((outputs + width + 1, inputs + width + 3), 7.0, dtype=dtype, device=device)
    matrix = whole[:-1, :-3]
    found = factors(parts, inputs, of_factors, device)
    want = by_hand(matrix[:outputs, :inputs], found, parts, width)
    for _ in range(2):
        fill(op, matrix, found, parts, inputs, width)
        got = matrix.cpu()
        assert torch.equal(got[:outputs, :inputs], want[:outputs, :inputs].to(dtype))
        assert torch.equal(got[outputs:, :inputs], rounded(op, want[outputs:, :inputs], dtype))
        # s is float32 on a GPU and float64 on a CPU, which is a rounding more.
        step = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got[:outputs, inputs:], rounded(op, want[:outputs, inputs:], dtype),
                                   rtol=step + 2e-7, atol=0)
        assert (whole[-1] == 7).all() and (whole[:, -3:] == 7).all()
        found = [None if f is None else (-f[0], f[1].flip(0), f[2] / 2) for f in found]
        want = by_hand(matrix[:outputs, :inputs], found, parts, width)


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_lora_is_two_products_with_it(op, device):
    """[x, xAᵀ]·[W, sB]ᵀ = x(W + sBA)ᵀ, and [dy, s·dyB]·[[W], [A]] = dy(W + sBA)."""
    parts, inputs, width = [(8, 4), (5, None), (3, 2)], 24, 8
    matrix = torch.full((24, 32), torch.nan, device=device)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(3)).to(device)
    matrix[:16, :24] = weight
    found = factors(parts, inputs, torch.float32, device)
    fill(op, matrix, found, parts, inputs, width)
    merged = weight.double()
    for f, (rows, _) in zip(found, layout(parts), strict=True):
        if f is not None:
            merged[rows] += f[2] * f[1].double() @ f[0].double()
    x, dy = torch.randn(7, 24, device=device, dtype=torch.float64), torch.randn(7, 16, device=device).double()
    W = matrix.double()
    y = torch.cat((x, x @ W[16:, :24].t()), 1) @ W[:16].t()
    dx = torch.cat((dy, dy @ W[:16, 24:]), 1) @ W[:, :24]
    torch.testing.assert_close(y, x @ merged.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy @ merged, rtol=1e-5, atol=1e-5)
