"""Parameters laid end to end train as they would apart."""

from typing import Any

import pytest
import torch
from torch import nn

from gazelle.engine.flat import FlatParameters, clip_

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((3, 5), (256,), (7,), (2, 300), (1,))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def fill(parts: list[nn.Parameter], seed: int) -> None:
    """Add gradients to those that are there, as a backward pass does."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    loss.backward()


def test_values_and_gradients_are_views() -> None:
    parts = parameters()
    values = [part.detach().clone() for part in parts]
    flat = FlatParameters(parts)
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True))
    start, end = flat.values.data_ptr(), flat.values.data_ptr() + flat.values.nbytes
    assert all(start <= part.data_ptr() < end and (part.data_ptr() - start) % 1024 == 0 for part in parts)
    fill(parts, 1)
    assert flat.values.grad is flat.grad
    assert flat.grad.norm().item() == pytest.approx(torch.stack([part.grad.norm() for part in parts]).norm().item())
    with torch.no_grad():
        flat.values.mul_(2)
        flat.grad.zero_()
    assert all(torch.equal(part, 2 * value) for part, value in zip(parts, values, strict=True))
    assert not any(part.grad.any() for part in parts)


def test_modules_keep_working() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    flat = FlatParameters(model.parameters())
    assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    model.load_state_dict({name: value + 1 for name, value in state.items()})
    assert flat.values.norm() != 0
    torch.testing.assert_close(model[1].bias, state["1.bias"] + 1)


def test_attach_puts_back_what_was_taken_away() -> None:
    parts = parameters()
    flat = FlatParameters(parts)
    fill(parts, 1)
    parts[0].data = torch.full(SHAPES[0], 7.0)
    parts[1].grad = None
    parts[2].grad = torch.ones(SHAPES[2])
    kept = parts[3].detach().clone()
    flat.attach()
    assert parts[0].eq(7).all() and torch.equal(parts[3], kept)
    assert not flat.grad.any()
    fill(parts, 2)
    assert flat.grad.norm().item() == pytest.approx(torch.stack([part.grad.norm() for part in parts]).norm().item())
    with torch.no_grad():
        flat.values.zero_()
    assert not any(part.any() for part in parts)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("groups", [1, 2])
def test_clipping(groups: int, max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    flats = [FlatParameters(ours[number::groups]) for number in range(groups)]
    fill(ours, 1)
    fill(theirs, 1)
    norm = clip_(flats, max_norm)
    wanted = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("kind", "options"), [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}), (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 1e-2}), (torch.optim.RMSprop, {"lr": 1e-3}),
])
def test_an_optimizer_steps_as_on_the_parts(kind: Any, options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatParameters(ours)
    on_flat, on_parts = kind([flat.values], **options), kind(theirs, **options)
    for seed in range(4):
        for _ in range(2):  # micro-batches
            fill(ours, seed)
            fill(theirs, seed)
        clip_([flat], 1.0)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        on_flat.step()
        on_parts.step()
        flat.grad.zero_()
        on_parts.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    used = sum(part.numel() for part in ours)
    assert flat.values.count_nonzero() == used  # what lies between the parts stays zero
