"""The trainer's numbers against loops written by hand: same loss, same gradients, whatever the batching."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import ROWS
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer


class Gradients(TrainerCallback):
    """Keeps a copy of every gradient just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()
                           if parameter.grad is not None})


def trained(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: list[dict[str, str]] = ROWS, **options: Any
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """(loss of each step, gradients of each step) of a run in the given order of rows."""
    recorder = Gradients()
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, "logging_steps": 1,
                "report": False, "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
                "max_length": 256}
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, callbacks=[recorder],
                         args=SFTConfig(output_dir=str(folder), **(settings | options)))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], recorder.steps


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def reference_batch(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """The rows rendered, labelled and padded the way a plain script does it: prompt and answer tokenised apart."""
    ids, labels = [], []
    for row in rows:
        messages = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids.append(prompt + answer + newline)
        labels.append([-100] * len(prompt) + answer + [-100] * len(newline))
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
    }


def test_five_steps_match_a_plain_loop(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Hugging Face + PEFT, padded, with Hugging Face's own loss and torch's AdamW."""
    rows = [ROWS[index % len(ROWS)] for index in range(15)]
    losses, gradients = trained(tiny(), demo_tokenizer, tmp_path, rows, max_steps=5, per_device_train_batch_size=3,
                                learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0)

    model = tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(5):
        loss = model(**reference_batch(demo_tokenizer, rows[3 * step : 3 * step + 3])).loss
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert_equal_gradients(gradients[step], {name: parameter.grad for name, parameter in model.named_parameters()
                                                 if parameter.grad is not None}, 1e-5)
        optimizer.step()
        optimizer.zero_grad()


def wide_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Hugging Face's norm, without its detour through float32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def test_the_real_model_matches_a_plain_loop(
    demo_model: Callable[[], Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, where the order in which sums are made cannot hide a mistake."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    model = FastLanguageModel.get_peft_model(demo_model().double(), r=4).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    batch = reference_batch(demo_tokenizer, ROWS[:3])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                if parameter.grad is not None}
    model.zero_grad()

    losses, (gradients,) = trained(model, demo_tokenizer, tmp_path, ROWS[:3], per_device_train_batch_size=3)
    assert losses[0] == pytest.approx(loss.item(), rel=1e-6)  # the trainer adds losses up in float32
    assert_equal_gradients(gradients, expected, 1e-9)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_training_equals_unpacked(
    strategy: str, tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    alone, (one_by_one,) = trained(tiny(), demo_tokenizer, tmp_path)
    # A capacity that holds all rows, so that "wrapped" has no row to cut.
    packed, (together,) = trained(tiny(), demo_tokenizer, tmp_path, packing=True, packing_strategy=strategy,
                                  max_length=512 if strategy == "wrapped" else 128)
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert_equal_gradients(together, one_by_one, 1e-5)


def test_rows_do_not_see_one_another(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The loss of a batch is the token-weighted mean of its rows' own losses."""
    together, _ = trained(tiny(), demo_tokenizer, tmp_path)
    total = count = 0.0
    for row in ROWS:
        batch = reference_batch(demo_tokenizer, [row])
        labelled = int((batch["labels"] != -100).sum())
        total += tiny()(**batch).loss.item() * labelled
        count += labelled
    assert together[0] == pytest.approx(total / count, rel=1e-5)


def test_accumulation_never_changes_the_gradient(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In float64, where the order in which sums are made cannot hide a mistake."""
    runs = [trained(tiny().double(), demo_tokenizer, tmp_path, per_device_train_batch_size=size,
                    gradient_accumulation_steps=8 // size) for size in (8, 4, 1)]
    (whole_loss, (whole,)), *others = runs
    for losses, (gradients,) in others:
        assert losses[0] == pytest.approx(whole_loss[0], rel=1e-6)
        assert_equal_gradients(gradients, whole, 1e-10)


def test_padded_batches_give_the_same_numbers(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, (gradients,) = trained(tiny(), demo_tokenizer, tmp_path)
    monkeypatch.setattr("gazelle.train.trainer.supports_packing", lambda model: "the test says so")
    padded, (others,) = trained(tiny(), demo_tokenizer, tmp_path)
    assert padded[0] == pytest.approx(packed[0], rel=1e-5)
    assert_equal_gradients(others, gradients, 1e-5)


def test_full_fine_tuning_matches_a_plain_loop(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    losses, (gradients,) = trained(tiny(adapter=False), demo_tokenizer, tmp_path)
    model = tiny(adapter=False)
    loss = model(**reference_batch(demo_tokenizer, ROWS)).loss
    loss.backward()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert_equal_gradients(gradients, {name: parameter.grad for name, parameter in model.named_parameters()}, 1e-5)


def test_checkpointing_changes_nothing(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain, (kept,) = trained(tiny(), demo_tokenizer, tmp_path)
    model = tiny()
    model.enable_input_require_grads()
    checkpointed, (recomputed,) = trained(model, demo_tokenizer, tmp_path, gradient_checkpointing=True)
    assert checkpointed == plain
    assert_equal_gradients(recomputed, kept, 1e-6)


def test_label_smoothing_is_torchs(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    losses, _ = trained(tiny(), demo_tokenizer, tmp_path, label_smoothing_factor=0.2)
    batch = reference_batch(demo_tokenizer, ROWS)
    logits = tiny()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_one_seed_gives_one_run(
    tiny: Callable[..., Any], demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "train_sampling_strategy": "random", "seed": 11}
    first, _ = trained(tiny(), demo_tokenizer, tmp_path, **options)
    second, _ = trained(tiny(), demo_tokenizer, tmp_path, **options)
    other, _ = trained(tiny(), demo_tokenizer, tmp_path, **options | {"seed": 12})
    assert first == second
    assert first != other
