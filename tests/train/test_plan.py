"""A run within a memory budget: what it refuses, what it does when memory runs out, and what it leaves behind."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import small_llama
from transformers import LlamaConfig, OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from gazelle import FastLanguageModel, SFTTrainer, accelerate
from gazelle.base import log
from gazelle.base.errors import OptionError, TrainingError
from gazelle.base.sizes import parse_bytes
from gazelle.engine import passes
from gazelle.engine.keep import ALL, KEEP, Keep
from gazelle.engine.keep import MLP as ATTENTION_KEPT
from gazelle.engine.outline import Batch
from gazelle.engine.plan import TooSmallError
from gazelle.models.outline import meta_model
from gazelle.models.swap import engine_layer, swapped_layers
from gazelle.train import plan as module
from gazelle.train.plan import plan_outline, too_small

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., SFTTrainer]
CPU = torch.device("cpu")


class Keeps(TrainerCallback):
    """What the layers really kept, step by step."""

    def __init__(self) -> None:
        self.steps: list[list[Keep]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append([engine_layer(layer).keep for layer in swapped_layers(model)])


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad}


def assert_same_run(trainer: SFTTrainer, other: SFTTrainer) -> None:
    assert losses(trainer) == losses(other)
    assert len(losses(trainer)) == 3
    theirs = adapters(other)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapters(trainer).items())


def assert_detached(model: Any) -> None:
    """Nothing of a run is left on the model."""
    for layer in swapped_layers(model):
        assert layer.gazelle.keep is None
        assert layer.gazelle.home is None
        assert not layer.gazelle.engine.shared.in_place
    assert "zero_grad" not in model.__dict__
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert all(parameter.untyped_storage().nbytes() >= parameter.nbytes > 0 for parameter in model.parameters())
    assert model.config._attn_implementation != "gazelle_packed"


# Budgets


def test_a_budget_that_is_too_small_names_one_that_is_not(quick: Make, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        quick(memory_budget="20MB")
    error = caught.value
    assert (error.where, error.found, error.exit_code) == ("memory_budget", "0.0 GB", 2)
    for lower in ("per_device_train_batch_size", "max_length", "4 bits", "paged_adamw_8bit", "smaller r"):
        assert lower in error.fix
    assert not (tmp_path / "out").exists()
    named = re.search(r"at least ([\d.]+ GB)", error.expected)
    assert named is not None
    trainer = quick(memory_budget=named[1])
    assert trainer.plan is not None
    assert trainer.plan.predicted_peak <= parse_bytes(named[1], "")
    trainer.train()
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize("smallest", [11_340_000_000, 11_300_000_000, 11_300_000_001, 49_999_999, 95_960_000_000])
def test_the_named_budget_is_enough_as_it_is_shown(smallest: int) -> None:
    error = too_small(TooSmallError(smallest), 10**9, chosen=True)
    named = re.search(r"at least ([\d.]+ GB)", error.expected)
    assert named is not None
    assert smallest <= parse_bytes(named[1], "") < smallest + 10**8
    assert "memory budget" in error.what
    assert "free" in too_small(TooSmallError(smallest), 10**9, chosen=False).what


def need(*, rows: int = 2, length: int = 2048, r: int = 64, stored: str = "dense", optim: str = "adamw_torch",
         checkpointing: bool | str = "auto") -> float:
    """The smallest budget for a model of a billion weights that is not there."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True)
    model = FastLanguageModel.get_peft_model(accelerate(meta_model(config, torch.bfloat16)), r=r)
    with pytest.raises(OptionError) as caught:
        plan_outline(model, Batch(rows * length, rows * length, length), CPU, optim=optim, precision="auto",
                     budget="2MB", checkpointing=checkpointing, stored=stored, measured=False)
    return float(caught.value.expected.split()[2])


def test_what_it_advises_helps() -> None:
    usual = need()
    for advised in ({"rows": 1}, {"length": 1024}, {"r": 8}, {"stored": "nf4"}, {"optim": "paged_adamw_8bit"}):
        assert need(**advised) < usual, advised
    assert need(checkpointing=False) > usual


# Choices


@pytest.mark.parametrize(("options", "keep"), [
    ({}, KEEP), ({"use_gradient_checkpointing": False}, KEEP), ({"use_gradient_checkpointing": "unsloth"}, KEEP),
    ({"use_gradient_checkpointing": True}, ALL), ({"gradient_checkpointing": True}, ALL),
    ({"use_gradient_checkpointing": "offload"}, ALL),  # a CPU has no other memory to move inputs to
    ({"gradient_checkpointing": True, "use_gradient_checkpointing": False}, KEEP),
], ids=str)
def test_a_choice_is_in_force_and_changes_nothing(quick: Make, options: dict[str, Any], keep: Keep) -> None:
    reference = quick()
    reference.train()
    trainer = quick(**options)
    recorder = Keeps()
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.steps == [[keep] * 3] * 3
    assert_same_run(trainer, reference)
    assert_detached(trainer.model)


@pytest.mark.parametrize(("choice", "keep"), [(True, ALL), (False, KEEP), ("unsloth", KEEP), ("offload", ALL)])
def test_the_adapters_choice_counts_where_the_run_makes_none(quick: Make, bytes_tokenizer: PreTrainedTokenizerBase,
                                                             choice: bool | str, keep: Keep) -> None:
    def kept(**options: Any) -> list[Keep]:
        model = small_llama(bytes_tokenizer, adapter=False)
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=choice)
        trainer = quick(model, max_steps=1, **options)
        recorder = Keeps()
        trainer.add_callback(recorder)
        trainer.train()
        return recorder.steps[0]

    assert kept() == [keep] * 3
    assert kept(use_gradient_checkpointing=True) == [ALL] * 3
    assert kept(use_gradient_checkpointing=False) == [KEEP] * 3


def test_a_frozen_embedding_wants_no_gradient(quick: Make, bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    """Though PEFT's preparation for quantised models asks for one: the same run, and the hook is there again."""
    runs, wanted = [], []
    for asked in (False, True):
        model = small_llama(bytes_tokenizer, adapter=False)
        model = FastLanguageModel.get_peft_model(model, r=4, layers_to_transform=[1, 2])
        if asked:
            model.enable_input_require_grads()
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda *call: wanted.append(call[-1].requires_grad))
        runs.append(quick(model))
        wanted.clear()
        runs[-1].train()
        assert wanted and not any(wanted)
    assert_same_run(*runs)
    assert runs[1].model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_a_budget_decides_what_is_kept(quick: Make) -> None:
    whole = quick()
    assert whole.plan is not None
    whole.train()
    lower = replace(whole.plan, plan=whole.plan.plan)
    assert lower.step_down(whole.model)
    lower._leave()
    trainer = quick(memory_budget=(lower.predicted_peak + whole.plan.predicted_peak) // 2)
    recorder = Keeps()
    trainer.add_callback(recorder)
    trainer.train()
    assert set(map(tuple, recorder.steps)) != {(KEEP, KEEP, KEEP)}
    assert trainer.plan is not None
    assert recorder.steps == [list(trainer.plan.plan.keeps)] * 3
    assert_same_run(trainer, whole)


def test_weights_and_embedding_in_host_memory(quick: Make, bytes_tokenizer: PreTrainedTokenizerBase,
                                              tmp_path: Path) -> None:
    """As a plan for a GPU may have it, with evaluation and checkpoints meanwhile."""

    def run(moved: bool) -> SFTTrainer:
        model = small_llama(bytes_tokenizer, tie_word_embeddings=False)
        trainer = quick(model, output_dir=str(tmp_path / str(moved)), eval_strategy="steps", eval_steps=1,
                        save_strategy="steps", save_steps=2)
        assert trainer.plan is not None
        if moved:
            trainer.plan.plan = replace(trainer.plan.plan, streamed=2, embedding_on_host=True, keeps=(ALL, KEEP, ALL))
        trainer.train()
        return trainer

    there, here = run(True), run(False)
    assert_same_run(there, here)
    assert [entry["eval_loss"] for entry in there.state.log_history if "eval_loss" in entry] \
        == [entry["eval_loss"] for entry in here.state.log_history if "eval_loss" in entry]
    assert_detached(there.model)
    ours, theirs = there.model.state_dict(), here.model.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    saved = [(tmp_path / str(moved) / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
             for moved in (True, False)]
    assert saved[0] == saved[1]


def test_models_that_the_engine_does_not_run_have_no_plan(quick: Make, monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level("INFO", "gazelle")
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=2, pad_token_id=0))
    trainer = quick(model, memory_budget="20MB")
    assert trainer.plan is None
    assert "memory_budget has no effect" in caplog.text
    trainer.train()
    assert len(losses(trainer)) == 3
    assert quick(engine=False).plan is None


# Memory that runs out


class Scarce:
    """A kernel of the engine that runs out of memory at some of its calls."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, at: Callable[[int], bool]) -> None:
        self.calls = 0
        original = getattr(passes, name)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if at(self.calls - 1):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args, **kwargs)

        patch.setattr(passes, name, kernel)


# Twelve calls to a step: two micro-batches through three layers; the backward pass calls its own kernel.
@pytest.mark.parametrize("at", [0, 2, 4, 8], ids=lambda at: f"call {at}")
@pytest.mark.parametrize("name", ["gated", "gated_backward"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])  # gradients laid end to end, and not
def test_memory_that_runs_out_once(quick: Make, optim: str, name: str, at: int, monkeypatch: pytest.MonkeyPatch,
                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gazelle")
    reference = quick(optim=optim)
    reference.train()
    trainer = quick(optim=optim)
    recorder = Keeps()
    trainer.add_callback(recorder)
    assert trainer.plan is not None
    peak = trainer.plan.predicted_peak
    Scarce(monkeypatch, name, lambda call: call == at)
    trainer.train()
    assert_same_run(trainer, reference)
    assert trainer.tokens == reference.tokens  # those of micro-batches that ran again count once
    assert trainer.plan.predicted_peak < peak
    broken = at // 6  # the step in which it happened
    assert all((keeps == [KEEP] * 3) == (step < broken) for step, keeps in enumerate(recorder.steps))
    assert recorder.steps[-1] == list(trainer.plan.plan.keeps)
    assert len(trainer.plan.notes) == 1
    assert "memory ran out" in trainer.plan.notes[0] and trainer.plan.plan.describe() in trainer.plan.notes[0]
    assert trainer.plan.notes[0] in caplog.text
    assert_detached(trainer.model)


def test_memory_that_runs_out_again_and_again(quick: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_DOWN", 0.9995)
    reference = quick()
    reference.train()
    trainer = quick()
    assert trainer.plan is not None
    Scarce(monkeypatch, "gated", lambda call: call in (1, 4, 5, 14))
    trainer.train()
    assert_same_run(trainer, reference)
    assert trainer.tokens == reference.tokens
    assert len(trainer.plan.notes) == 4
    said = [float(size) for note in trainer.plan.notes for size in re.findall(r"([\d.]+) GB", note)]
    assert said == sorted(said, reverse=True)
    assert [text for what, text in trainer.plan.lines() if what == "note"] == trainer.plan.notes


def test_the_report_says_that_memory_ran_out(quick: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = quick(report=True, report_samples=0, max_steps=6)
    assert trainer.plan is not None
    Scarce(monkeypatch, "gated", lambda call: call == 7)
    trainer.train()
    page = (tmp_path / "out" / "report.html").read_text()
    for what, text in trainer.plan.lines():
        assert what in page and text in page
    assert "memory ran out with a predicted peak of" in page
    assert trainer.plan.measured_seconds is not None and trainer.plan.measured_seconds > 0
    assert re.search(r"predicted [\d,]+ ms for [\d,]+ tokens; measured [\d,]+ ms \([+-][\d.]+%\)", page)


def test_memory_that_runs_out_in_evaluation(quick: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch size, and perhaps all logits: no plan of the training steps would help."""
    trainer = quick(eval_strategy="steps", eval_steps=1)

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, "evaluate", no_room)
    with pytest.raises(TrainingError, match="outside of training steps") as caught:
        trainer.train()
    assert "per_device_eval_batch_size" in caught.value.fix
    assert_detached(trainer.model)


@pytest.mark.parametrize("checkpointing", ["auto", False])
def test_when_nothing_lower_is_left(quick: Make, checkpointing: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quick(use_gradient_checkpointing=checkpointing)
    assert trainer.plan is not None
    kernel = Scarce(monkeypatch, "gated_backward", lambda call: True)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    error = caught.value
    assert "memory ran out" in error.what and "Tried to allocate" in error.found
    assert "per_device_train_batch_size" in error.fix and error.exit_code == 2
    steps_down = 0 if checkpointing is False else 1  # everything kept is all that was allowed
    assert len(trainer.plan.notes) == steps_down
    assert kernel.calls == 1 + steps_down
    assert_detached(trainer.model)
    monkeypatch.undo()
    again = quick(trainer.model)  # the model is as good as new
    reference = quick()
    again.train()
    reference.train()
    assert_same_run(again, reference)


def test_the_lowest_plan_is_tried_though_it_is_not_much_lower(quick: Make) -> None:
    trainer = quick()
    made = trainer.plan
    assert made is not None
    peak, smallest = made.predicted_peak, 0
    with pytest.raises(TooSmallError) as caught:
        made._planned(1)
    smallest = caught.value.smallest
    assert peak * module.STEP_DOWN < smallest < peak
    assert made.step_down(trainer.model)
    assert made.predicted_peak == smallest
    assert not made.step_down(trainer.model)
    made._leave()


@pytest.mark.parametrize("when", ["forward", "backward", "callback"])
def test_after_an_error_nothing_is_left_on_the_model(quick: Make, bytes_tokenizer: PreTrainedTokenizerBase, when: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if when == "callback":
                raise KeyError

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError

    trainer = quick(small_llama(bytes_tokenizer, tie_word_embeddings=False))
    assert trainer.plan is not None
    trainer.plan.plan = replace(trainer.plan.plan, streamed=2, embedding_on_host=True, keeps=(ATTENTION_KEPT,) * 3)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.add_callback(Fails())
    if when != "callback":
        monkeypatch.setattr(passes, {"forward": "gated", "backward": "gated_backward"}[when], fail)
    with pytest.raises(KeyError):
        trainer.train()
    assert_detached(trainer.model)
    assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in before.items())


# What is said


def test_lines_compare_what_was_predicted_with_what_was_measured(quick: Make) -> None:
    made = quick().plan
    assert made is not None
    made.plan = replace(made.plan, peak=8 * 10**9, seconds=0.2)
    made.batch = Batch(4096, 1000, 2048)
    made.notes = ["something happened"]
    assert made.lines() == [
        ("plan", "3 layers keep everything"), ("peak memory", "predicted 8.0 GB"),
        ("time of a micro-batch", "predicted 200 ms for 4,096 tokens"), ("note", "something happened")]
    made.measured_peak, made.measured_seconds = 84 * 10**8, 0.15
    assert made.lines()[1:3] == [
        ("peak memory", "predicted 8.0 GB; measured 8.4 GB (+5.0%)"),
        ("time of a micro-batch", "predicted 200 ms for 4,096 tokens; measured 150 ms (-25.0%)")]
    made.plan = replace(made.plan, seconds=None)
    assert [what for what, _ in made.lines()] == ["plan", "peak memory", "note"]
