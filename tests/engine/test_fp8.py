"""Projections in fp8 against the exact ones; on a CPU the products are those of the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gazelle.base.errors import OptionError
from gazelle.engine.fp8 import Fp8Projection, check_fp8, fits_fp8
from gazelle.engine.linear import Adapter, Gradients, Linear, Projection
from gazelle.engine.scratch import Scratch
from gazelle.kernels.fp8 import fp8_supported
from gazelle.quantize.storage import Dense

pytestmark = pytest.mark.usefixtures("one_thread")
HAS_FP8 = torch.cuda.is_available() and fp8_supported(torch.device("cuda"))
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")]
T, K = 40, 96


def linears(dtype: torch.dtype, device: str = "cpu", rank: int = 4) -> list[Linear]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator)).to(device, dtype)

    parts = []
    for number, N in enumerate((64, 32, 32)):
        weight = draw(N, K, size=K**-0.5) * torch.linspace(0.1, 10, N, device=device, dtype=dtype)[:, None]
        adapter = None
        if rank and number != 1:
            adapter = Adapter(draw(rank, K, size=0.2).requires_grad_(), draw(N, rank, size=0.2).requires_grad_(), 0.5)
        parts.append(Linear(Dense(weight), draw(N).requires_grad_() if number == 0 else None, adapter))
    return parts


def run(kind: Any, parts: list[Linear], x: Tensor, dy: Tensor, residual: Tensor | None) -> list[Tensor]:
    projection = kind(parts, Scratch(), 0, x.dtype)
    entry, d = projection.input(T), projection.output(T)
    entry[:, :K], d[:, : projection.N] = x, dy
    y, z = projection.forward(entry, projection.matrix(), residual=residual)
    W = projection.matrix(again=True)
    dx = projection.input_gradient(d, W)
    grads = Gradients(list(projection.trainable()))
    projection.parameter_gradients(d, entry[:, :K], W, z, grads)
    return [y, dx, *(grads.of(tensor) for tensor in projection.trainable())]


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double().cpu() - theirs.double().cpu()).norm() / theirs.double().norm())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("add", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("rank", [0, 4])
def test_error_is_that_of_three_digits(rank: int, add: bool, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    x, dy, more = (torch.randn(T, width, generator=generator).to(device, dtype) for width in (K, 128, 128))
    ours = run(Fp8Projection, linears(dtype, device, rank), x, dy, more if add else None)
    theirs = run(Projection, linears(torch.float64, rank=rank), x.cpu().double(), dy.cpu().double(),
                 more.cpu().double() if add else None)
    assert len(ours) == len(theirs) == (7 if rank else 3)
    assert 1e-3 < error(ours[0], theirs[0]) < 0.05
    assert 1e-3 < error(ours[1], theirs[1]) < 0.05
    for a, b in zip(ours[2:], theirs[2:], strict=True):  # these never were in fp8
        assert a.dtype == dtype
        assert error(a, b) < (1e-5 if device == "cpu" else 1e-2)


def test_rows_of_unlike_size_keep_their_digits() -> None:
    """Each row of weights has its own scale, so a small row is as exact as a large one."""
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(T, K, generator=generator), torch.randn(T, 128, generator=generator)
    ours, theirs = (run(kind, linears(torch.float32, rank=0), x, dy, None)[0] for kind in (Fp8Projection, Projection))
    bias = linears(torch.float32)[0].bias.detach()
    each = (ours - theirs).norm(dim=0)[:64] / (theirs[:, :64] - bias).norm(dim=0)
    assert each.max() < 0.1


def test_changed_factors_are_used_at_the_next_pass() -> None:
    parts = linears(torch.float32)
    projection = Fp8Projection(parts, Scratch(), 0, torch.float32)
    before = projection.matrix()
    adapter: Any = parts[2].adapter
    with torch.no_grad():
        adapter.a.mul_(2)
    rows, columns = projection.spans[2]
    assert torch.equal(projection.matrix().a[columns], 2 * before.a[columns])
    assert torch.equal(projection.matrix().b[rows, columns], 0.5 * adapter.b.detach())


def test_what_fits() -> None:
    assert fits_fp8(linears(torch.float32))
    frozen = Linear(Dense(torch.zeros(32, 48)))
    assert fits_fp8([frozen])
    assert not fits_fp8([frozen, Linear(Dense(torch.zeros(32, 48, requires_grad=True)))])
    assert not fits_fp8([frozen, Linear(Dense(torch.zeros(24, 48)))])
    assert not fits_fp8([Linear(Dense(torch.zeros(32, 40)))])


def test_other_devices_are_refused() -> None:
    with pytest.raises(OptionError, match="cannot compute in fp8") as caught:
        check_fp8(torch.device("cpu"))
    assert "cpu" in str(caught.value) and 'precision="fp8"' in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")
def test_a_model_in_fp8() -> None:
    from tests.models.families import adapt, gradients, make, packed, rows, twin

    from gazelle import accelerate
    from gazelle.models.packed import packed_attention_on
    from gazelle.models.swap import swapped_layers
    from gazelle.train.loss import batch_loss

    model = adapt(make("llama3", 0, hidden_size=256, intermediate_size=512, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=64), r=8).to("cuda", torch.bfloat16)
    results = []
    for precision in ("auto", "fp8"):
        each = accelerate(twin(model), precision=precision)
        with packed_attention_on(each):
            loss, _ = batch_loss(each, packed(rows(0, (100, 37)), "cuda"))
        loss.backward()
        results.append((loss.item(), torch.cat([grad.flatten().float() for grad in gradients(each).values()])))
        kinds = {type(projection) for layer in swapped_layers(each) for projection in layer.gazelle.layer.projections}
        assert kinds == {Fp8Projection if precision == "fp8" else Projection}
    assert results[1][0] == pytest.approx(results[0][0], rel=0.03)
    assert error(results[1][1], results[0][1]) < 0.35  # a random model magnifies what is rounded
