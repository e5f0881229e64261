"""Gradients of several adapters, added where they are gathered, against products in float64."""

import pytest
import torch

from gazelle.kernels import factors, factors_triton
from gazelle.kernels.factors import Factors, Normed, Sums
from gazelle.kernels.norm import rms_norm

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(factors, "cpu", id="reference"),
        pytest.param(factors_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(factors, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
# (outputs, rank) of each part, None for one without an adapter; inputs; columns of the border; tokens
CASES = [
    ([(13, 3)], 20, 3, 7), ([(13, 3)], 20, 64, 64), ([(8, 4), (5, 2), (3, 1)], 24, 8, 100),
    ([(6, None), (9, 2)], 33, 5, 65), ([(150, 8), (70, 8), (9, 2)], 130, 24, 600), ([(20, 70), (5, 3)], 12, 80, 30)]


def random(generator, device, *shape, dtype=torch.float32, room=0):
    """A view whose rows lie apart by `room`."""
    return torch.randn(*shape[:-1], shape[-1] + room, generator=generator).to(device, dtype)[..., : shape[-1]]


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("parts", "inputs", "border", "tokens"), CASES)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_gets_its_own(op, device, parts, inputs, border, tokens, normed, dtype):
    if op is factors_triton and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    generator = torch.Generator().manual_seed(0)
    outputs = sum(n for n, _ in parts)
    dy, z, dz = (random(generator, device, tokens, size, dtype=dtype, room=3) for size in (outputs, border, border))
    x = inner = random(generator, device, tokens, inputs, dtype=dtype, room=2)
    if normed:
        weight = random(generator, device, inputs, dtype=dtype)
        inner, rstd = rms_norm(x, weight, 1e-5, 1.0)
        x = Normed(x, weight, 1e-5, 1.0, rstd)
    targets, expected = [], []
    row = column = 0
    for number, (n, r) in enumerate(parts):
        if r is not None:
            rows, columns = slice(row, row + n), slice(column, column + r)
            a, b = random(generator, device, r, inputs), random(generator, device, n, r)
            part = Factors(a, b, 0.5 + number, rows, columns)
            expected.append((part.a.double() + dz[:, columns].double().t() @ inner.double(),
                             part.b.double() + part.scale * dy[:, rows].double().t() @ z[:, columns].double()))
            targets.append(part)
            column += r
        row += n
    op.add_factor_gradients(dy, x, z, dz, targets)
    for part, (a, b) in zip(targets, expected, strict=True):
        torch.testing.assert_close(part.a.double(), a, rtol=1e-5, atol=1e-6 * tokens)
        torch.testing.assert_close(part.b.double(), b, rtol=1e-5, atol=1e-6 * tokens)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("given", ["a", "b", "both"])
@pytest.mark.parametrize(("parts", "inputs", "border", "tokens"), [case for case in CASES if case[0][0][1] is not None])
def test_sums_made_elsewhere(op, device, parts, inputs, border, tokens, given):
    """In three pieces. What they stand for is not read."""
    generator = torch.Generator().manual_seed(0)
    outputs, ranks, widest = sum(n for n, _ in parts), sum(r for _, r in parts), max(r for _, r in parts)
    dy, x, z, dz = (random(generator, device, tokens, size) for size in (outputs, inputs, border, border))
    of_a, of_b = (random(generator, device, 3, *shape) for shape in ((ranks, inputs), (outputs, widest)))
    sums = Sums(of_a if given != "b" else None, of_b if given != "a" else None)
    targets, expected = [], []
    row = column = 0
    for n, r in parts:
        rows, columns = slice(row, row + n), slice(column, column + r)
        part = Factors(random(generator, device, r, inputs), random(generator, device, n, r), 0.5, rows, columns)
        a = dz[:, columns].double().t() @ x.double() if given == "b" else of_a.double().sum(0)[columns]
        b = dy[:, rows].double().t() @ z[:, columns].double() if given == "a" else of_b.double().sum(0)[rows, :r]
        expected.append((part.a.double() + a, part.b.double() + 0.5 * b))
        targets.append(part)
        row, column = row + n, column + r
    op.add_factor_gradients(dy, x if given == "b" else None, z, dz, targets, sums)
    for part, (a, b) in zip(targets, expected, strict=True):
        torch.testing.assert_close(part.a.double(), a, rtol=1e-5, atol=1e-6 * tokens)
        torch.testing.assert_close(part.b.double(), b, rtol=1e-5, atol=1e-6 * tokens)
