"""Packed attention against each row alone in float64, forward and backward, for both of its layouts."""

import pytest
import torch

from gazelle.kernels import attention

H, D = 6, 8


def reference(q, k, v, cu, scale, window, softcap):
    outputs = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = [x[0, :, start:end] for x in (q, k, v)]
        groups = H // rows[1].shape[0]
        scores = rows[0] @ rows[1].repeat_interleave(groups, 0).transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance >= (window or 10**9))
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ rows[2].repeat_interleave(groups, 0))
    return torch.cat(outputs, 1)[None]


@pytest.mark.parametrize("layout", ["by row", "padded"])
@pytest.mark.parametrize("heads", [6, 2, 1])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (4, 2.0), (99, None)])
def test_equals_each_row_alone(layout, heads, window, softcap):
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 6, 6, 19], dtype=torch.int32)  # one row of a single token, one of none
    exact = [torch.randn(1, n, 19, D, dtype=torch.float64, requires_grad=True) for n in (H, heads, heads)]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    function = attention._padded if layout == "padded" else attention.packed_attention
    got = function(*inputs, cu, 13, 0.3, window, softcap, 0.0)
    want = reference(*exact, cu, 0.3, window, softcap)
    direction = torch.randn_like(want)
    got.backward(direction.float())
    want.backward(direction)
    torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=1e-5)
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad, y.grad.float(), atol=5e-6, rtol=1e-5)


def test_another_batch_is_not_taken_for_the_last():
    x = torch.randn(1, H, 8, D)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32)
    first = attention._padded(x, x, x, cu, 4, 1.0, None, None, 0.0)
    cu[1] = 3  # in place: the same object, other rows
    second = attention._padded(x, x, x, cu, 5, 1.0, None, None, 0.0)
    torch.testing.assert_close(second, reference(x, x, x, cu, 1.0, None, None))
    assert not torch.equal(first, second)


def test_rows_that_do_not_add_up():
    x = torch.randn(1, H, 8, D)
    with pytest.raises(ValueError, match="describes 7 tokens, but there are 8"):
        attention.packed_attention(x, x, x, torch.tensor([0, 3, 7]), 4, 1.0)
