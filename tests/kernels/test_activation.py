"""act(gate) · up and its gradients against autograd in float64, apart and in place."""

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from gazelle.kernels import activation, activation_triton
from gazelle.kernels.factors import Factors

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(activation, "cpu", id="reference"),
        pytest.param(activation_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(activation, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, where 1/∞ is meant
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
KINDS = {"silu": functional.silu, "gelu": functional.gelu,
         "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh")}
# [T, F]: one program a row; several, the last not full; a single element; no token.
SHAPES = [(3, 37), (2, 1100), (1, 1), (0, 8)]


def inputs(shape, dtype=torch.float32, device="cpu"):
    """gate and up, and the gradient of their product, as views into wider rows. Some gates are large."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1] + 5, generator=generator)
    gate_up[:, : shape[1] // 3] *= 8
    dh = torch.randn(shape[0], shape[1] + 3, generator=generator)
    return gate_up.to(device, dtype)[:, : 2 * shape[1]], dh.to(device, dtype)[:, : shape[1]]


def exact(gate_up, dh, kind):
    """h and the gradient of gate and up, by autograd in float64."""
    leaf = gate_up.detach().double().cpu().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    h = KINDS[kind](gate) * up
    return h.detach(), torch.autograd.grad(h, leaf, dh.double().cpu())[0]


def close(op, got, want):
    """act is float32, and the result is rounded once. The interpreter cuts bfloat16 off."""
    cut = 2 if got.dtype == torch.bfloat16 and op is activation_triton else 1
    atol = min(ROUNDING[got.dtype], 5e-7) * (want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double().cpu(), want, rtol=cut * ROUNDING[got.dtype], atol=atol)


def test_every_kind_is_tested():
    assert set(activation.KINDS) == set(KINDS)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(op, device, kind, dtype, shape):
    gate_up, dh = inputs(shape, dtype, device)
    want = exact(gate_up, dh, kind)[0]
    h = op.gated(gate_up, kind)
    assert h.shape == shape and h.dtype == dtype and h.is_contiguous()
    close(op, h, want)
    whole = torch.full((shape[0] + 1, shape[1] + 5), 7.0, dtype=dtype, device=device)
    out = whole[:-1, : shape[1]]
    assert op.gated(gate_up, kind, out) is out
    close(op, out, want)
    assert (whole[-1] == 7).all() and (whole[:, shape[1] :] == 7).all()


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(op, device, kind, dtype, shape):
    """Into another tensor, and then over gate and up, filling h on the way. Borders stay as they are."""
    gate_up, dh = inputs(shape, dtype, device)
    before, kept = gate_up.clone(), dh.clone()
    want_h, want = exact(gate_up, dh, kind)
    whole = torch.full((shape[0] + 1, 2 * shape[1] + 5), 7.0, dtype=dtype, device=device)
    out = whole[:-1, : 2 * shape[1]]
    assert op.gated_backward(gate_up, dh, kind, out) is out
    close(op, out, want)
    assert (whole[-1] == 7).all() and (whole[:, 2 * shape[1] :] == 7).all()
    assert torch.equal(gate_up, before) and torch.equal(dh, kept)
    beside = gate_up._base[:, 2 * shape[1] :].clone()
    h = torch.full((shape[0], shape[1] + 2), 7.0, dtype=dtype, device=device)
    assert op.gated_backward(gate_up, dh, kind, gate_up, h[:, :-2]) is gate_up
    close(op, gate_up, want)
    close(op, h[:, :-2], want_h)
    assert torch.equal(gate_up._base[:, 2 * shape[1] :], beside) and (h[:, -2:] == 7).all()
    assert torch.equal(dh, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64(kind):
    gate_up, dh = inputs((3, 37), torch.float64)
    want_h, want = exact(gate_up, dh, kind)
    close(activation, activation.gated(gate_up, kind), want_h)
    h = torch.empty_like(want_h)
    close(activation, activation.gated_backward(gate_up, dh, kind, gate_up, h), want)
    close(activation, h, want_h)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(op, device, kind):
    """What has gone to zero or one is exactly that, and nothing overflows."""
    gate = torch.tensor([[-1e4, -90, -40, 40, 90, 1e4]], device=device)
    gate_up = torch.cat((gate, torch.full_like(gate, 3)), 1)
    h = op.gated(gate_up, kind)
    assert torch.equal(h[:, 3:], 3 * gate[:, 3:])
    assert (h[:, :3].abs() < 1e-14).all()
    d_gate, d_up = op.gated_backward(gate_up, torch.full_like(gate, 2), kind, gate_up).chunk(2, 1)
    assert torch.equal(d_up[:, 3:], 2 * gate[:, 3:]) and (d_up[:, :3].abs() < 1e-14).all()
    assert (d_gate[:, 3:] == 6).all() and (d_gate[:, :3].abs() < 1e-14).all()


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_equals_hugging_face(op, device, kind, name):
    gate_up, dh = inputs((5, 24), device=device)
    leaf = gate_up.detach().clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    want = ACT2FN[name](gate) * up
    close(op, op.gated(gate_up, kind), want.detach().double().cpu())
    grad = torch.autograd.grad(want, leaf, dh)[0]
    close(op, op.gated_backward(gate_up, dh, kind, gate_up), grad.double().cpu())


# (rows of 2F and columns of each adapter of gate and up), columns of down's, T, F
LAYOUTS = [([("gate", 0, 4), ("up", 4, 7)], 5, 70, 37), ([("up", 0, 3)], 16, 300, 150), ([("both", 0, 6)], 2, 33, 128),
           ([("gate", 0, 16)], 1, 5, 9)]


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("adapters", "columns", "T", "F"), LAYOUTS)
def test_backward_with_sums(op, device, kind, dtype, adapters, columns, T, F):
    """The same gradients in place, and the products that gradients of LoRA factors are made of."""
    if op is activation_triton and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16")
    gate_up, dh = inputs((T, F), dtype, device)
    generator = torch.Generator().manual_seed(1)
    z, dz = (torch.randn(T, width, generator=generator).to(device, dtype)[:, :-3] for width in (20, columns + 9))
    spans = {"gate": slice(0, F), "up": slice(F, 2 * F), "both": slice(0, 2 * F)}
    parts = []
    for name, first, end in adapters:
        n, r = spans[name].stop - spans[name].start, end - first
        parts.append(Factors(torch.empty(r, 1), torch.empty(n, r), 2.0, spans[name], slice(first, end)))
    want, h = torch.empty_like(gate_up), torch.empty_like(dh)
    op.gated_backward(gate_up, dh, kind, want, h)
    of_a, of_b = op.gated_backward_sums(gate_up, dh, kind, z, dz, parts, columns)
    assert torch.equal(gate_up, want)
    assert of_a.dtype == of_b.dtype == torch.float32
    tolerance = {"rtol": 1e-4, "atol": 2e-5 * T}
    torch.testing.assert_close(of_a.double().sum(0), dz[:, :columns].double().t() @ h.double(), **tolerance)
    for part in parts:
        exact_b = want[:, part.rows].double().t() @ z[:, part.columns].double()
        torch.testing.assert_close(of_b.double().sum(0)[part.rows, : part.a.shape[0]], exact_b, **tolerance)
