"""Recorded steps against the same steps run as they are, on a GPU."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.families import adapt, make, packed, rows, twin
from torch import Tensor

from gazelle import accelerate
from gazelle.engine import graph as module
from gazelle.engine.graph import WARM_UP, StepGraph
from gazelle.models.packed import packed_attention_on
from gazelle.train.dataset import labelled_targets
from gazelle.train.loss import batch_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Steps:
    """A model's steps; gradients lie where they are from the beginning."""

    def __init__(self, model: Any) -> None:
        self.model = accelerate(model)
        self.runs = 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: dict[str, Tensor], static: tuple) -> Tensor:
        self.runs += 1
        starts, longest = batch["cu_seq_lens_q"], static[0]
        loss, _ = batch_loss(self.model, {**batch, "labels": None, "cu_seq_lens_k": starts, "max_length_q": longest,
                                          "max_length_k": longest})
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad.clone() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad.zero_()
        return found


def batch_of(seed: int, lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], tuple]:
    made = packed(rows(seed, lengths), "cuda")
    batch = {name: made[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
    batch["positions"], batch["targets"] = labelled_targets(made["labels"])
    return batch, (max(lengths),)


def model_of(family: str = "llama3", **options: Any) -> Any:
    """Rows are short enough for attention's backward pass to add in one order."""
    model = make(family, 0, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32)
    return adapt(model, r=8, **options).to("cuda", torch.bfloat16)


@pytest.fixture
def pair() -> Iterator[tuple[Steps, Steps]]:
    """Twice the same model, ready for packed rows."""
    model = model_of()
    one, other = Steps(twin(model)), Steps(model)
    with packed_attention_on(one.model), packed_attention_on(other.model):
        yield one, other


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(grad.any() for grad in theirs)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma"])
def test_replays_equal_eager_steps(family: str) -> None:
    model = model_of(family)
    recorded, eager = Steps(twin(model)), Steps(model)
    graph = StepGraph(recorded)
    with packed_attention_on(recorded.model), packed_attention_on(eager.model):
        for seed in range(6):
            batch, static = batch_of(seed, (40, 21, 33))
            assert torch.equal(graph(batch, static), eager(batch, static))
            assert_equal(recorded.gradients(), eager.gradients())
    assert graph.reason is None
    assert graph.replayed == 6 - WARM_UP
    assert recorded.runs == WARM_UP + 1


def test_rows_may_lie_otherwise(pair: tuple[Steps, Steps]) -> None:
    """Of one shape, but with other lengths of rows."""
    recorded, eager = pair
    graph = StepGraph(recorded)
    for seed, lengths in enumerate(((40, 21, 33), (33, 40, 21), (21, 33, 40), (40, 40, 14), (40, 1, 53), (30, 30, 34))):
        batch, _ = batch_of(seed, lengths)
        count = 60  # labels fall otherwise: as many positions in each
        batch["positions"], batch["targets"] = batch["positions"][:count], batch["targets"][:count]
        assert len(batch["targets"]) == count
        assert torch.equal(graph(batch, (60,)), eager(batch, (60,)))
        assert_equal(recorded.gradients(), eager.gradients())
    assert graph.replayed == 6 - WARM_UP


def test_gradients_are_accumulated_and_weights_are_read_anew(pair: tuple[Steps, Steps]) -> None:
    recorded, eager = pair
    graph = StepGraph(recorded)
    optimizers = [torch.optim.AdamW(steps.parameters, lr=1e-2) for steps in pair]
    for seed in range(0, 12, 3):
        for micro in range(3):
            batch, static = batch_of(seed + micro, (40, 21))
            assert torch.equal(graph(batch, static), eager(batch, static))
        for optimizer in optimizers:
            optimizer.step()
        assert_equal(recorded.gradients(), eager.gradients())
    assert graph.replayed == 12 - WARM_UP
    assert_equal(recorded.parameters, eager.parameters)


def test_each_shape_has_a_graph(pair: tuple[Steps, Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, eager = pair
    monkeypatch.setattr(module, "MOST_SHAPES", 2)
    graph = StepGraph(recorded)
    shapes = ((40, 21), (30, 30, 5), (50,))
    for turn in range(5):
        for number, lengths in enumerate(shapes):
            batch, static = batch_of(3 * turn + number, lengths)
            assert torch.equal(graph(batch, static), eager(batch, static))
            assert_equal(recorded.gradients(), eager.gradients())
    assert graph.replayed == 2 * (5 - WARM_UP)  # the third shape runs as it is
    graph.clear()
    batch, static = batch_of(0, shapes[0])
    assert torch.equal(graph(batch, static), eager(batch, static))
    assert graph.replayed == 2 * (5 - WARM_UP)


def test_what_is_no_tensor_has_a_graph_of_its_own() -> None:
    weight = torch.ones(3, device="cuda", requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def step(batch: dict[str, Tensor], static: tuple) -> Tensor:
        loss = (batch["x"] * weight).sum() * static[0]
        loss.backward()
        return loss.detach()

    graph = StepGraph(step)
    for turn in range(5):
        for factor in (2, 3):
            assert graph({"x": torch.full((3,), float(turn), device="cuda")}, (factor,)).item() == 3 * turn * factor
    assert torch.equal(weight.grad, torch.full_like(weight, 5 * (0 + 1 + 2 + 3 + 4)))
    assert graph.replayed == 2 * (5 - WARM_UP)


def test_the_loss_of_a_replay_is_not_overwritten_by_the_next() -> None:
    graph = StepGraph(lambda batch, _: batch["x"].sum())
    losses = [graph({"x": torch.full((3,), float(turn), device="cuda")}) for turn in range(6)]
    assert [loss.item() for loss in losses] == [0, 3, 6, 9, 12, 15]


def test_dropout_draws_anew_in_each_replay() -> None:
    steps = Steps(model_of(lora_dropout=0.5))
    graph = StepGraph(steps)
    batch, static = batch_of(0, (40, 21))
    with packed_attention_on(steps.model):
        losses = [graph(batch, static).item() for _ in range(8)]
    assert graph.reason is None
    assert graph.replayed == 8 - WARM_UP
    assert len(set(losses)) > 6


@pytest.mark.filterwarnings("ignore")  # torch's own, of a capture that failed
def test_what_cannot_be_recorded_runs_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gazelle")
    weight = torch.ones(3, device="cuda", requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def step(batch: dict[str, Tensor], static: tuple) -> Tensor:
        loss = (batch["x"] * weight).sum()
        if loss.item() > 1e9:  # waits for the device
            raise AssertionError
        loss.backward()
        return loss.detach()

    graph = StepGraph(step)
    for turn in range(8):
        batch = {"x": torch.full((3 + turn % 2,), float(turn), device="cuda")[:3]}
        assert graph(batch).item() == 3 * turn
    assert "captur" in graph.reason
    assert graph.replayed == 0
    assert torch.equal(weight.grad, torch.full_like(weight, sum(range(8))))
    assert caplog.text.count("not recorded as CUDA graphs") == 1
    # What torch leaves behind of a capture that failed would stop the next to draw, to record or to run out of memory.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    other = StepGraph(lambda batch, _: batch["x"].sum() + torch.rand((), device="cuda"))
    for turn in range(5):
        assert turn <= other({"x": torch.full((1,), float(turn), device="cuda")}).item() < turn + 1
    assert other.replayed == 5 - WARM_UP


def test_running_out_of_memory_is_not_hidden() -> None:
    def step(batch: dict[str, Tensor], static: tuple) -> Tensor:
        total = batch["x"].sum()
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no room")
        return total

    graph = StepGraph(step)
    batch = {"x": torch.ones(3, device="cuda")}
    for _ in range(WARM_UP):
        graph(batch)
    with pytest.raises(torch.OutOfMemoryError):
        graph(batch)
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
