"""Gradients of several adapters, cut out of two matrices and added where they are gathered, against slices."""

import pytest
import torch

from gazelle.kernels import factors, factors_triton
from gazelle.kernels.factors import Factors

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(factors, "cpu", id="reference"),
        pytest.param(factors_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(factors, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
# (outputs, rank) of each part, None for one without an adapter; inputs; columns of the border
CASES = [([(13, 3)], 20, 3), ([(13, 3)], 20, 64), ([(8, 4), (5, 2), (3, 1)], 24, 8), ([(6, None), (9, 2)], 33, 5),
         ([(300, 8), (70, 8), (9, 2)], 1030, 24)]


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("parts", "inputs", "border"), CASES)
def test_each_part_gets_its_own(op, device, parts, inputs, border):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    outputs = sum(n for n, _ in parts)
    dA, dB = random(border, inputs), random(outputs, border)
    targets, expected = [], []
    row = column = 0
    for number, (n, r) in enumerate(parts):
        if r is not None:
            rows, columns = slice(row, row + n), slice(column, column + r)
            part = Factors(random(r, inputs), random(n, r), 0.5 + number, rows, columns)
            expected.append((part.a.double() + dA[part.columns].double(),
                             part.b.double() + part.scale * dB[part.rows, part.columns].double()))
            targets.append(part)
            column += r
        row += n
    op.add_factor_gradients(dA, dB, targets)
    for part, (a, b) in zip(targets, expected, strict=True):
        torch.testing.assert_close(part.a.double(), a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.b.double(), b, rtol=1e-6, atol=1e-6)
