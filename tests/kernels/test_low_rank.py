"""y + zbᵀ + residual against the same in float64."""

import pytest
import torch

from gazelle.kernels import low_rank, low_rank_triton

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(low_rank, "cpu", id="reference"),
        pytest.param(low_rank_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(low_rank, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
DTYPES = [torch.float32, pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]


def drawn(*shape, dtype, device, seed):
    """Rows that lie apart."""
    values = torch.randn(shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)[:, 1:-4]


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("across", [False, True], ids=["rows of b", "columns of b"])
@pytest.mark.parametrize(("T", "N", "R"), [(5, 7, 3), (64, 128, 16), (70, 300, 40), (9, 20, 150)])
def test_the_sum(op, device, dtype, add, across, T, N, R):
    if op is low_rank_triton and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16")
    y, z, residual = (drawn(T, width, dtype=dtype, device=device, seed=width) for width in (N, R, N + 1))
    residual = residual[:, 1:] if add else None
    b = drawn(*((R, N) if across else (N, R)), dtype=dtype, device=device, seed=3)
    b = b.t() if across else b
    exact = y.double().cpu() + z.double().cpu() @ b.double().cpu().t()
    if add:
        exact += residual.double().cpu()
    room = torch.full((T + 1, N + 2), 7.0, dtype=dtype, device=device)
    got = op.add_low_rank(y, z, b, residual, room[:T, :N])
    error = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double().cpu(), exact, rtol=error, atol=error)
    assert (room[T] == 7).all() and (room[:, N:] == 7).all()
    again = op.add_low_rank(y, z, b, residual, y)
    assert again.data_ptr() == y.data_ptr() and torch.equal(again, got)
