"""Products with a weight against float64, with rows and weights that lie apart."""

import pytest
import torch

from gazelle.kernels.matmul import times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("form", ["whole", "transposed", "gaps", "transposed gaps"])
def test_equals_float64(form: str, add: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    T, N, K = 7, 13, 9
    x = torch.randn(T, K + 3, generator=generator, dtype=torch.float64).to(dtype)[:, :K]
    residual = torch.randn(T, N + 2, generator=generator, dtype=torch.float64).to(dtype)[:, :N] if add else None
    gap = 4 if "gaps" in form else 0
    rows, columns = (K, N) if "transposed" in form else (N, K)
    weight = torch.randn(rows, columns + gap, generator=generator, dtype=torch.float64).to(dtype)[:, :columns]
    weight = weight.t() if "transposed" in form else weight
    before = None if residual is None else residual.clone()
    want = x.double() @ weight.double().t() + (0 if residual is None else residual.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    y = times(x, weight, residual)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    assert residual is None or torch.equal(residual, before)


def test_where_there_is_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with_it = times(x, weight)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    torch.testing.assert_close(times(x, weight), with_it)
    torch.testing.assert_close(times(x, weight, with_it), 2 * with_it)
