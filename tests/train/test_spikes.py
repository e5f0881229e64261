"""Steps that would do harm do nothing but say so, or what the policy asks; a run that goes on like that ends."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.conftest import small_llama
from transformers import TrainerCallback

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import TrainingError
from gazelle.models import swap
from gazelle.train.facts import plan_lines
from gazelle.train.optimizer import clip_finite
from gazelle.train.spikes import MOST, MOST_OTHERWISE, RollBack, Spikes, not_finite, undo_on_device

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., SFTTrainer]
LAYER = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
OTHERS = ("base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight",
          "base_model.model.model.layers.2.mlp.up_proj.lora_A.default.weight")


@pytest.fixture(params=["fp8", "auto"])
def any_precision(request: pytest.FixtureRequest, quick: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Trainers in fp8, which a CPU computes slowly by the reference, and in the model's own type."""
    monkeypatch.setattr(swap, "check_fp8", lambda device: None)
    return lambda **options: quick(precision=request.param, **options)


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


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])  # gradients laid end to end, and not
def test_the_step_is_skipped(any_precision: Make, optim: str, max_grad_norm: float, value: float,
                             caplog: pytest.LogCaptureFixture) -> None:
    trainer = any_precision(optim=optim, max_grad_norm=max_grad_norm, max_steps=4, weight_decay=0.1)
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
    said = f"1 not finite; the last: the gradient of {LAYER} is not finite"
    assert plan_lines(trainer)[-1] == ("skipped steps", said)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_only_those_that_are_not_finite_are_named(fp8: Make, max_grad_norm: float,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """Clipping by a norm that is no number would make all of them so."""
    trainer = fp8(max_grad_norm=max_grad_norm)
    poison(trainer, {1}, float("nan"), (*OTHERS, LAYER))
    trainer.train()
    assert trainer._spikes.names == [LAYER, *OTHERS]
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
    assert (trainer._spikes.skipped, trainer._spikes.in_a_row) == (5, 1)


def spikes(precision: str = "auto", policy: str = "skip", checkpoint: Any = None) -> Spikes:
    return Spikes(policy, 10.0, precision, torch.device("cpu"), lambda: False, lambda: checkpoint)


def test_float16_leaves_the_step_to_its_scaler_and_waits_longer() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, float("inf")]])
    watch = spikes("fp16")
    arguments = SimpleNamespace(learning_rate=1e-3, max_grad_norm=1.0), SimpleNamespace(global_step=0), None

    def step() -> None:
        watch.look(model)
        watch.on_pre_optimizer_step(*arguments, model=model, optimizer=torch.optim.SGD(model.parameters()))

    for _ in range(MOST["fp16"] - 1):
        step()
        assert model.weight.grad is not None
    assert watch.skipped == MOST["fp16"] - 1 > MOST_OTHERWISE
    with pytest.raises(TrainingError, match="fp16"):
        step()


def test_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        largest = torch.finfo(dtype).max
        numbers = [[1.0, 2.0], [nan, 1.0], [largest] * 1000, [-inf, 1.0], [0.0], [inf, nan], [-largest] * 3]
        assert not_finite([torch.tensor(values, dtype=dtype) for values in numbers]) == [1, 3, 5]
    assert not_finite([]) == []


def blow_up(trainer: SFTTrainer, times: dict[int, float], what: str = "gradient") -> None:
    """The whole gradient, or the loss that is told, becomes so many times as large in these steps."""
    original = trainer.training_step

    def training_step(model: Any, inputs: Any, count: Any = None) -> torch.Tensor:
        loss = original(model, inputs, count)
        factor = times.get(trainer.state.global_step + 1, 1.0)
        if what == "loss":
            trainer._spikes.add_loss(loss * (factor - 1))
        elif factor != 1.0:
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_spike_is_skipped_and_named(quick: Make, what: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer = quick(max_steps=28, learning_rate=1e-4, max_grad_norm=0.0, gradient_accumulation_steps=1)
    history = History()
    trainer.add_callback(history)
    blow_up(trainer, {5: 1e4, 25: 1e4}, what)
    trainer.train()
    assert same(history.weights[24], history.weights[23]) and not same(history.weights[25], history.weights[24])
    assert not same(history.weights[4], history.weights[3])  # five steps say nothing yet of what is ordinary
    assert trainer._spikes.counts == {"spike": 1}
    assert "Step 25 is skipped: a spike: gradient norm" in caplog.text
    assert plan_lines(trainer)[-1][1].startswith("1 spike; the last: a spike: gradient norm")


def test_spikes_that_stay_become_the_ordinary(quick: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = quick(max_steps=30, learning_rate=1e-4, max_grad_norm=0.0, gradient_accumulation_steps=1)
    blow_up(trainer, dict.fromkeys(range(23, 31), 1e4))
    trainer.train()
    assert trainer._spikes.counts == {"spike": 3}
    assert "3 spikes in a row" in caplog.text


def test_what_scatters_is_no_spike() -> None:
    """An ordinary run's norms, far apart as those of single rows are."""
    watch = spikes()
    generator = torch.Generator().manual_seed(0)
    found = 0
    for norm, loss in torch.randn(5000, 2, generator=generator).mul(0.7).exp().tolist():
        most_norm, most_loss = watch.limits(1.0)
        found += norm > most_norm or loss > most_loss
        watch.norms.append(norm)
        watch.losses.append(loss)
    assert found == 0
    watch.norms.clear(), watch.losses.clear()
    watch.norms.extend([0.5] * 30), watch.losses.extend([2.0] * 30)
    assert watch.limits(0.0) == pytest.approx((5.0, 6.0))
    assert watch.limits(7.0)[0] == 7.0  # what clipping would not touch
    watch.factor = 0.0
    assert watch.limits(0.0)[0] > 1e38


def test_stopping(quick: Make) -> None:
    trainer = quick(max_steps=6, on_spike="stop", save_strategy="steps", save_steps=2)
    poison(trainer, {5}, float("nan"))
    with pytest.raises(TrainingError, match="step 5 would have done harm") as caught:
        trainer.train()
    assert "checkpoint-4" in caught.value.fix and caught.value.where == LAYER


def test_rolling_back(quick: Make, caplog: pytest.LogCaptureFixture) -> None:
    """To the checkpoint of step 4; step 5 is then left out, as its batch led to it."""
    trainer = quick(max_steps=7, on_spike="rollback", save_strategy="steps", save_steps=2,
                    gradient_accumulation_steps=1)
    history = History()
    trainer.add_callback(history)
    poison(trainer, {5}, float("nan"))
    trainer.train()
    weights = history.weights  # step 5 did not end the first time
    assert len(weights) == 7 and trainer.state.global_step == 7
    assert same(weights[4], weights[3])  # step 5, left out
    assert not same(weights[5], weights[4])
    assert trainer._spikes.counts == {"not finite": 1, "rolled back": 1, "left out after rolling back": 1}
    assert "Going back to" in caplog.text and "checkpoint-4" in caplog.text
    steps = [json.loads(line)["step"] for line in
             (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert steps[:7] == [1, 2, 3, 4, 5, 6, 7]


def test_rolling_back_goes_back(quick: Make) -> None:
    trainer = quick(max_steps=7, on_spike="rollback", save_strategy="steps", save_steps=3,
                    gradient_accumulation_steps=1)
    history = History()
    trainer.add_callback(history)
    poison(trainer, {5}, float("nan"))
    trainer.train()
    weights = history.weights
    assert len(weights) == 8  # 1 2 3 4, then 4 5 6 7
    assert not same(weights[3], weights[2])
    assert same(weights[4], weights[2]) and same(weights[5], weights[2])  # 4 and 5 again, left out
    assert not same(weights[6], weights[5])
    assert trainer._spikes.counts["left out after rolling back"] == 2


def test_a_verdict_heard_after_rolling_back_is_not_heard_again() -> None:
    """On a GPU step 6 is saved, undone, before the host hears of it: the run went back to where it was heard of."""
    watch = spikes(policy="rollback", checkpoint="checkpoint-6")
    watch._unheard = 6, [float("nan"), 1.0, 1.0]
    saved = copy.deepcopy(watch.state_dict())
    arguments = SimpleNamespace(learning_rate=1e-3, max_grad_norm=1.0), SimpleNamespace(global_step=6), None
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter])
    with pytest.raises(RollBack):
        watch.on_pre_optimizer_step(*arguments, model=torch.nn.Linear(1, 1), optimizer=optimizer)
    watch.load_state_dict(saved)
    watch.on_step_begin()
    watch.norm = 1.0
    watch.on_pre_optimizer_step(*arguments, model=torch.nn.Linear(1, 1), optimizer=optimizer)
    assert watch.counts == {"not finite": 1, "rolled back": 1} and parameter.grad is not None
    fresh = spikes(checkpoint="checkpoint-6")  # of a process that has heard nothing
    fresh.load_state_dict(saved)
    fresh.on_step_begin()
    fresh.norm = 1.0
    fresh.on_pre_optimizer_step(*arguments, model=torch.nn.Linear(1, 1), optimizer=optimizer)
    assert fresh.counts == {"not finite": 1}


def test_rolling_back_to_a_checkpoint_that_was_named(quick: Make, tmp_path: Path) -> None:
    """Which lies in another folder; and a run that starts anew does not go back to one of the run before."""
    first = quick(max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    named = tmp_path / "elsewhere" / "checkpoint-2"
    shutil.move(Path(first.args.output_dir) / "checkpoint-2", named)
    trainer = quick(max_steps=4, on_spike="rollback")
    poison(trainer, {3}, float("nan"))
    trainer.train(resume_from_checkpoint=str(named))
    assert trainer.state.global_step == 4
    assert trainer._spikes.counts == {"not finite": 1, "rolled back": 1, "left out after rolling back": 1}
    trainer.train()
    assert trainer._spikes.counts == {"not finite": 1}


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3, float("inf")])
def test_clipping_leaves_what_is_not_finite(max_grad_norm: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(5)) for _ in range(4)] for _ in range(2))
    for one, other in zip(ours[:3], theirs[:3], strict=True):  # the last one has none
        one.grad = torch.randn(5)
        other.grad = one.grad.clone()
    assert clip_finite(ours, max_grad_norm) == torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours[:3], theirs[:3], strict=True))
    before = ours[0].grad.clone()
    ours[1].grad[2] = float("inf")
    assert clip_finite(ours, max_grad_norm).isinf()
    assert torch.equal(ours[0].grad, before) and not_finite([part.grad for part in ours[:3]]) == [1]


def test_gradients_are_looked_through_only_when_their_norm_is_no_number(quick: Make) -> None:
    for max_grad_norm in (1.0, 0.0):
        trainer = quick(optim="adafactor", max_grad_norm=max_grad_norm, max_steps=4)
        poison(trainer, {3}, float("nan"))
        looked = []
        look = trainer._spikes.look
        trainer._spikes.look = lambda model, look=look, trainer=trainer, looked=looked: looked.append(  # type: ignore
            trainer.state.global_step + 1) or look(model)
        trainer.train()
        assert looked == [3]


def test_rolling_back_without_a_checkpoint_skips(quick: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = quick(max_steps=3, on_spike="rollback")
    poison(trainer, {2}, float("nan"))
    trainer.train()
    assert "There is no checkpoint yet to roll back to." in caplog.text
    assert trainer._spikes.counts == {"not finite": 1}


@pytest.mark.parametrize("fused", [True, False])
def test_undone_without_waiting(fused: bool) -> None:
    """What happens on a GPU, with a verdict that the host has not seen."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(300))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)

    def step(bad: bool) -> tuple[torch.Tensor, Any]:
        parameter.grad = torch.full((300,), float("nan")) if bad else torch.randn(300)
        undo_on_device(optimizer, torch.tensor(bad))
        optimizer.step()
        return parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])

    step(False)
    before = step(False)
    after = step(True)
    if fused:
        assert same(before[1], after[1]) and torch.equal(before[0], after[0])
    else:
        assert after[0].isfinite().all() and torch.allclose(after[1][0]["exp_avg"], before[1][0]["exp_avg"] * 0.9)
    assert not torch.equal(step(False)[0], after[0])


def test_masked_rows_count_for_nothing(quick: Make, bytes_tokenizer: Any) -> None:
    """A micro-batch without a label adds exactly zero, and a step of such alone is a step of zeros, not of NaN."""
    def rows(masked: list[bool]) -> list[dict[str, Any]]:
        return [{"input_ids": [1, 5 + n, 6, 7, 8 + n], "labels": [-100] * 5 if off else [-100, -100, 6, 7, 8 + n]}
                for n, off in enumerate(masked)]

    def train(data: list[dict[str, Any]], accumulation: int) -> SFTTrainer:
        config = SFTConfig(output_dir=quick().args.output_dir, max_steps=1, per_device_train_batch_size=1, report=False,
                           gradient_accumulation_steps=accumulation, disable_tqdm=True, save_strategy="no",
                           logging_steps=1, train_sampling_strategy="sequential", learning_rate=1e-2, max_grad_norm=0.0)
        trainer = SFTTrainer(small_llama(bytes_tokenizer), config, data, None, bytes_tokenizer)
        trainer.gradients = {}
        step = trainer._spikes.on_pre_optimizer_step

        def look(*args: Any, model: Any = None, **kwargs: Any) -> None:
            trainer.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                                 if parameter.grad is not None}
            step(*args, model=model, **kwargs)

        trainer._spikes.on_pre_optimizer_step = look  # type: ignore[method-assign]
        trainer.train()
        return trainer

    mixed = train(rows([True, False, True]), 3)
    alone = train(rows([True, False, True])[1:2], 1)
    assert mixed.gradients.keys() == alone.gradients.keys()
    assert all(torch.equal(gradient, alone.gradients[name]) for name, gradient in mixed.gradients.items())
    assert mixed.state.log_history[0]["loss"] == alone.state.log_history[0]["loss"]
    nothing = train(rows([True, True]), 2)
    assert all(not gradient.any() for gradient in nothing.gradients.values())
    assert nothing.state.log_history[0]["loss"] == 0.0 and not nothing._spikes.counts
