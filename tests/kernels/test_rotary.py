"""Rotated heads against transformers and a complex product in float64; the backward pass turns them back."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gazelle.kernels import rotary, rotary_triton

CUDA = torch.cuda.is_available()
WAYS = [pytest.param(rotary, "cpu", id="reference"),
        pytest.param(rotary_triton, "cpu", id="interpreted", marks=pytest.mark.skipif(CUDA, reason="compiled")),
        pytest.param(rotary, "cuda", id="native", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# (T, heads, head size, how much of it rotates): more heads than a program takes, and a count that does not divide;
# a part of the head, down to one pair; halves that are no power of two; one of each; no token.
SHAPES = [(5, 11, 16, 16), (3, 4, 16, 4), (4, 3, 20, 12), (2, 9, 6, 2), (1, 1, 2, 2), (0, 3, 8, 8)]


def heads(tokens, count, width, dtype=torch.float32, device="cpu", seed=0):
    """[T, h, D] as a view into wider rows."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(tokens, count * width + 7, generator=generator).to(device, dtype)
    return whole[:, 3 : count * width + 3].unflatten(1, (count, width))


def angles(tokens, turning, dtype=torch.float32, device="cpu"):
    """cos and sin [T, Dr] as transformers makes them, with positions that start again and jump."""
    generator = torch.Generator().manual_seed(7)
    position = torch.randint(0, 3000, (tokens, 1), generator=generator)
    angle = position / 10000 ** (torch.arange(0, turning, 2) / turning)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def turned(x, cos, sin, sign=1):
    """Each pair as a complex number times e^(±i·angle), in float64."""
    x, half = x.double().cpu(), cos.shape[1] // 2
    factor = torch.complex(cos.double().cpu(), sign * sin.double().cpu())[:, None, :half]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * factor
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)


def close(op, got, want):
    """Products are float32, and the result is rounded once. The interpreter cuts bfloat16 off."""
    cut = 2 if got.dtype == torch.bfloat16 and op is rotary_triton else 1
    atol = min(ROUNDING[got.dtype], 1e-6) * (want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double().cpu(), want, rtol=cut * ROUNDING[got.dtype], atol=atol)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "count", "width", "turning"), SHAPES)
def test_in_place(op, device, inverse, dtype, tokens, count, width, turning):
    x = heads(tokens, count, width, dtype, device)
    whole = x._base
    before = whole.clone()
    cos, sin = angles(tokens, turning, dtype, device)
    want = turned(x, cos, sin, -1 if inverse else 1)
    assert op.rotate_(x, cos, sin, inverse) is x
    close(op, x, want)
    assert torch.equal(x[..., turning:], before[:, 3:-4].unflatten(1, (count, width))[..., turning:])
    assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, -4:], before[:, -4:])


def test_in_float64():
    x, (cos, sin) = heads(5, 3, 8, torch.float64), angles(5, 6, torch.float64)
    want = turned(x, cos, sin)
    close(rotary, rotary.rotate_(x, cos, sin), want)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("turning", [16, 8])
def test_equals_transformers_and_its_gradient(op, device, turning):
    """Partial rotation as transformers' models do it: the rest of a head is put back behind."""
    q, k = heads(6, 4, 16, device=device).requires_grad_(), heads(6, 2, 16, device=device, seed=1).requires_grad_()
    cos, sin = angles(6, turning, device=device)
    first, second = apply_rotary_pos_emb(q[..., :turning].transpose(0, 1)[None], k[..., :turning].transpose(0, 1)[None],
                                         cos[None], sin[None])
    want = [torch.cat((x[0].transpose(0, 1), whole[..., turning:]), -1)
            for x, whole in ((first, q), (second, k))]
    grads = [heads(6, x.shape[1], 16, device=device, seed=2) for x in want]
    backward = torch.autograd.grad(want, (q, k), grads)
    for x, y, grad, dx in zip((q, k), want, grads, backward, strict=True):
        close(op, op.rotate_(x.detach().clone(), cos, sin), y.detach().double().cpu())
        close(op, op.rotate_(grad.clone(), cos, sin, inverse=True), dx.double().cpu())


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_the_inverse_undoes_it(op, device):
    x, (cos, sin) = heads(5, 3, 16, device=device), angles(5, 16, device=device)
    before = x.double().cpu()
    op.rotate_(op.rotate_(x, cos, sin), cos, sin, inverse=True)
    close(op, x, before)


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_everything_may_lie_apart(op, device):
    """cos in rows of a longer table, sin alone; heads that are each part of a wider one, in q, k and v otherwise."""
    cos, sin = angles(5, 8, device=device)
    table = torch.cat((cos, cos.new_full((5, 3), 7.0)), 1)[:, :8]
    q, k, v = (heads(5, n, width, device=device)[..., :8] for n, width in ((3, 9), (2, 12), (2, 8)))
    out = torch.empty(5, 56, device=device)
    op.rotate_into(q, k, v, table, sin, out)
    a, b, c = out.unflatten(1, (7, 8)).split((3, 2, 2), 1)
    close(op, a, turned(q, cos, sin, -1))
    close(op, b, turned(k, cos, sin, -1))
    assert torch.equal(c, v)
    want = turned(k, cos, sin)
    close(op, op.rotate_(k, table, sin), want)


@pytest.mark.parametrize(("op", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("tokens", "count", "width", "turning"), [
    (5, 4, 16, 16), (3, 8, 16, 6), (4, 4, 20, 12), (2, 12, 6, 2), (0, 4, 8, 8)])
def test_into_what_they_were_split_from(op, device, dtype, kv_heads, tokens, count, width, turning):
    """Queries and keys turned back, values as they are, side by side in wider rows."""
    q, k, v = (heads(tokens, n, width, dtype, device, seed) for seed, n in enumerate((count, kv_heads, kv_heads)))
    cos, sin = angles(tokens, turning, dtype, device)
    size = (count + 2 * kv_heads) * width
    whole = torch.full((tokens + 1, size + 5), 7.0, dtype=dtype, device=device)
    out = whole[:-1, :size]
    kept = [x.clone() for x in (q, k, v)]
    assert op.rotate_into(q, k, v, cos, sin, out) is out
    a, b, c = out.unflatten(1, (-1, width)).split((count, kv_heads, kv_heads), 1)
    close(op, a, turned(q, cos, sin, -1))
    close(op, b, turned(k, cos, sin, -1))
    assert torch.equal(c, v)
    assert (whole[-1] == 7).all() and (whole[:, size:] == 7).all()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize(("op", "device"), WAYS)
def test_gradients_of_a_split_in_another_layout(op, device):
    """As attention hands them back: heads first in memory, and cos and sin in float32 beside bfloat16 gradients."""
    def laid(n, seed):
        x = heads(6, n, 8, torch.bfloat16, device, seed)
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    q, k, v = laid(4, 0), laid(2, 1), laid(2, 2)
    cos, sin = angles(6, 8, device=device)
    out = op.rotate_into(q, k, v, cos, sin, torch.empty(6, 64, dtype=torch.bfloat16, device=device))
    close(op, out[:, :32].unflatten(1, (4, 8)), turned(q, cos, sin, -1))
    close(op, out[:, 32:48].unflatten(1, (2, 8)), turned(k, cos, sin, -1))
    assert torch.equal(out[:, 48:].unflatten(1, (2, 8)), v)
