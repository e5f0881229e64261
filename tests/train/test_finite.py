"""Gradients that are not finite: the step does nothing but say so, and a run that goes on like that ends."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from gazelle import SFTTrainer
from gazelle.base.errors import TrainingError
from gazelle.models import swap
from gazelle.train.facts import plan_lines
from gazelle.train.finite import MOST, FiniteGradients, not_finite

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., SFTTrainer]
LAYER = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
OTHERS = ("base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight",
          "base_model.model.model.layers.2.mlp.up_proj.lora_A.default.weight")


@pytest.fixture
def fp8(quick: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Trainers in fp8, which a CPU computes slowly by the reference."""
    monkeypatch.setattr(swap, "check_fp8", lambda device: None)
    return lambda **options: quick(precision="fp8", **options)


def poison(trainer: SFTTrainer, steps: set[int], value: float, names: tuple[str, ...] = (LAYER,)) -> None:
    """One number of each of these gradients becomes `value` in some steps, counted from 1."""
    original = trainer.training_step
    parameters = dict(trainer.model.named_parameters())

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        if trainer.state.global_step + 1 in steps:
            for name in names:
                parameters[name].grad[-1, -1] = value
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]


class History(TrainerCallback):
    """Trained weights and the optimizer's state after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.states: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
                    **kwargs: Any) -> None:
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()
                             if parameter.requires_grad})
        self.states.append(copy.deepcopy(optimizer.state_dict()["state"]))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])  # gradients laid end to end, and not
def test_the_step_is_skipped(fp8: Make, optim: str, max_grad_norm: float, value: float,
                             caplog: pytest.LogCaptureFixture) -> None:
    trainer = fp8(optim=optim, max_grad_norm=max_grad_norm, max_steps=4, weight_decay=0.1)
    history = History()
    trainer.add_callback(history)
    poison(trainer, {2}, value)
    trainer.train()
    weights, states = history.weights, history.states
    assert same(weights[1], weights[0]) and same(states[1], states[0])
    assert not any(torch.equal(weights[2][name], weight) for name, weight in weights[1].items())
    assert not same(states[2], states[1]) and not same(weights[3], weights[2])
    assert all(weight.isfinite().all() for weight in weights[3].values())
    assert f"Step 2 is skipped: the gradient of {LAYER} is not finite." in caplog.text
    assert caplog.text.count("is skipped") == 1
    assert plan_lines(trainer)[-1] == ("skipped steps", f"1, the last as the gradient of {LAYER} was not finite")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_only_those_that_are_not_finite_are_named(fp8: Make, max_grad_norm: float,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """Clipping by a norm that is no number would make all of them so."""
    trainer = fp8(max_grad_norm=max_grad_norm)
    poison(trainer, {1}, float("nan"), (*OTHERS, LAYER))
    trainer.train()
    assert trainer._finite is not None
    assert trainer._finite.names == [LAYER, *OTHERS]
    assert f"the gradient of {LAYER} is not finite, nor are those of 2 others." in caplog.text


def test_too_many_in_a_row_end_the_run(fp8: Make) -> None:
    trainer = fp8(max_steps=10)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    poison(trainer, set(range(1, 11)), float("nan"))
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    error = caught.value
    assert (error.where, error.exit_code) == (LAYER, 2)
    assert "3 steps in a row" in error.what
    assert "fp8" in error.found and "0.01" in error.found
    assert "learning_rate" in error.fix and "bf16" in error.fix
    assert trainer.state.global_step == 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert "zero_grad" not in trainer.model.__dict__


def test_some_now_and_then_do_not(fp8: Make) -> None:
    trainer = fp8(max_steps=7)
    poison(trainer, {1, 2, 4, 5, 7}, float("inf"))
    trainer.train()
    assert trainer.state.global_step == 7
    assert trainer._finite is not None
    assert (trainer._finite.skipped, trainer._finite.in_a_row) == (5, 1)


@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}, {"precision": "bf16"}])
def test_other_precisions_do_not_look(quick: Make, options: dict[str, Any]) -> None:
    trainer = quick(**options)
    assert trainer._finite is None
    assert not [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FiniteGradients)]


def test_float16_leaves_the_step_to_its_scaler_and_waits_longer() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, float("inf")]])
    finite = FiniteGradients("fp16", scaled=True)
    arguments = SimpleNamespace(learning_rate=1e-3), SimpleNamespace(global_step=0), None

    def step() -> None:
        finite.on_pre_optimizer_step(*arguments, model=model, optimizer=torch.optim.SGD(model.parameters()))

    for _ in range(MOST["fp16"] - 1):
        step()
        assert model.weight.grad is not None
    assert finite.skipped == MOST["fp16"] - 1 > MOST["fp8"]
    with pytest.raises(TrainingError, match="fp16"):
        step()


def test_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        largest = torch.finfo(dtype).max
        numbers = [[1.0, 2.0], [nan, 1.0], [largest] * 1000, [-inf, 1.0], [0.0], [inf, nan], [-largest] * 3]
        assert not_finite([torch.tensor(values, dtype=dtype) for values in numbers]) == [1, 3, 5]
    assert not_finite([]) == []
