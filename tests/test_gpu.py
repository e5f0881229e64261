"""What only a GPU can show: native kernels, 16-bit and 4-bit training, 8-bit optimizers. Run by `make test-gpu`."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.conftest import small_tokenizer
from tests.train.conftest import ROWS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
from gazelle.data.templates import TEMPLATES, get_template
from gazelle.kernels.attention import packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama on disk, in bfloat16, with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=384, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(checkpoint: Path, folder: Path, steps: int = 40, options: dict[str, Any] | None = None,
          **loading: Any) -> tuple[Any, Any, list[float]]:
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), max_seq_length=256, **loading)
    if not loading.get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(model, r=8)
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "report": False,
                "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    trainer = SFTTrainer(model, SFTConfig(output_dir=str(folder), **(settings | (options or {}))), ROWS,
                         processing_class=tokenizer)
    trainer.train()
    return model, tokenizer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 5.0)])
def test_packed_attention_on_the_gpu(
    dtype: torch.dtype, tolerance: float, window: int | None, softcap: float | None
) -> None:
    lengths = [5, 64, 1, 33, 100]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    q, k, v, w = (torch.randn(1, heads, total, 64, generator=generator, dtype=torch.float64) for heads in (8, 2, 2, 8))
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        inputs = [x.detach().to(device, kind).requires_grad_() for x in (q, k, v)]
        out = packed_attention(*inputs, cu_seqlens.to(device), 100, 0.125, window, softcap)
        out.backward(w.to(device, kind))
        results.append([x.double().cpu() for x in (out, *(i.grad for i in inputs if i.grad is not None))])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("loading", [
    {"load_in_4bit": False}, {"load_in_4bit": True}, {"load_in_8bit": True},
    {"load_in_4bit": False, "dtype": torch.float16}, {"full_finetuning": True},
], ids=["bf16", "nf4", "int8", "fp16", "full"])
def test_training_learns_and_merges(loading: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-3} if loading.get("full_finetuning") else {}
    model, tokenizer, losses = train(checkpoint, tmp_path / "out", options=options, **loading)
    assert losses[-1] < 0.6 * losses[0]
    FastLanguageModel.for_inference(model)
    ids = torch.tensor([tokenizer("the quick brown fox")["input_ids"]], device="cuda")
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cuda")
    with torch.no_grad():
        after = merged(input_ids=ids).logits.float()
    assert (before - after).norm() <= 0.05 * before.norm()


def test_eight_bit_optimizers_and_checkpointing(checkpoint: Path, tmp_path: Path) -> None:
    plain = train(checkpoint, tmp_path / "a", load_in_4bit=True)[2]
    for number, options in enumerate(({"optim": "adamw_8bit"}, {"optim": "paged_adamw_8bit"},
                                      {"gradient_checkpointing": True})):
        losses = train(checkpoint, tmp_path / str(number), options=options, load_in_4bit=True)[2]
        assert losses[0] == pytest.approx(plain[0], rel=1e-3)
        assert losses[-1] < 0.6 * losses[0]


def test_one_seed_gives_one_run(checkpoint: Path, tmp_path: Path) -> None:
    runs = [train(checkpoint, tmp_path / str(number), steps=10, load_in_4bit=True)[2] for number in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("loading", [{"load_in_4bit": False}, {"load_in_4bit": True}], ids=["bf16", "nf4"])
@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_recorded_steps_train_as_others_with_evaluation_in_between(loading: dict[str, Any], precision: str,
                                                                   checkpoint: Path, tmp_path: Path) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    options = {"precision": precision, "packing": True, "gradient_accumulation_steps": 2, "eval_strategy": "steps",
               "eval_steps": 3, "per_device_train_batch_size": 1}
    runs = []
    for recorded in (True, False):
        model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), max_seq_length=256, **loading)
        model = FastLanguageModel.get_peft_model(model, r=8)
        args = SFTConfig(output_dir=str(tmp_path / str(recorded)), max_steps=12, learning_rate=5e-3, report=False,
                         save_strategy="no", disable_tqdm=True, logging_steps=1, step_graph=recorded, **options)
        trainer = SFTTrainer(model, args, ROWS, eval_dataset=ROWS[:5], processing_class=tokenizer)
        trainer.train()
        if recorded:
            assert trainer._step.graph.replayed > 0
            assert trainer._step.graph.reason is None
        runs.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history])
    # Recorded batches are rounded up to a common size, so their sums round otherwise.
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][-2] < 0.8 * runs[0][0]


class Poison(TrainerCallback):
    """Makes one number of the gradient NaN in a step, and keeps the weights after each."""

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, list[torch.Tensor]()
        self.optimizer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
                    **kwargs: Any) -> None:
        self.optimizer = optimizer
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_a_step_is_undone_without_waiting_for_the_device(optim: str, checkpoint: Path, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8)
    watch = Poison(6)
    args = SFTConfig(output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, report=False, optim=optim,
                     save_strategy="no", disable_tqdm=True, logging_steps=100, learning_rate=1e-3)
    trainer = SFTTrainer(model, args, ROWS, processing_class=tokenizer, callbacks=[watch])
    original, waits = trainer.training_step, []

    def training_step(*inputs: Any, **named: Any) -> torch.Tensor:
        loss = original(*inputs, **named)
        if trainer.state.global_step + 1 == 6:
            trainer._held.flats[0].grad[7] = float("nan")
        return loss

    trainer.training_step = training_step
    judge = trainer._spikes.on_pre_optimizer_step

    def judged(*inputs: Any, **named: Any) -> None:
        try:
            with warnings.catch_warnings():  # it is "a prototype feature"
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")  # an event that is waited for is none of what it forbids
            judge(*inputs, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(trainer._spikes.late)

    trainer._spikes.on_pre_optimizer_step = judged
    trainer.train()
    assert all(waits) and len(waits) == 12
    weights = watch.weights
    assert all(weight.isfinite().all() for weight in weights)
    moved = [(b - a).abs().max().item() for a, b in itertools.pairwise(weights)]
    assert (moved[4] == 0.0) == (optim == "adamw_torch_fused")  # others fade their moments for a step
    assert moved[4] < 2 * moved[3] and moved[5] > 0
    assert trainer._spikes.counts == {"not finite": 1}
    assert "Step 6 is skipped" in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_resuming_is_exact_on_the_gpu(optim: str, checkpoint: Path, tmp_path: Path) -> None:
    """Adapters large enough that a paged optimizer pages; dropout, recorded steps, late verdicts."""
    def run(name: str, resume: bool) -> tuple[list[Any], torch.Tensor, Any]:
        model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), max_seq_length=256, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(model, r=64, lora_dropout=0.1)
        watch = Poison(0)
        args = SFTConfig(output_dir=str(tmp_path / name), max_steps=8, per_device_train_batch_size=2, report=False,
                         save_strategy="steps", save_steps=3, disable_tqdm=True, logging_steps=2, optim=optim,
                         learning_rate=1e-3)
        trainer = SFTTrainer(model, args, ROWS, processing_class=tokenizer, callbacks=[watch])
        trainer.train(resume_from_checkpoint=resume)
        paged = [getattr(state["state1"], "is_paged", False) for state in watch.optimizer.state.values()
                 if "state1" in state]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], watch.weights[-1], paged

    whole = run("whole", False)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "cut" / "checkpoint-3")
    again = run("cut", True)
    assert again[0] == whole[0] and torch.equal(again[1], whole[1])
    assert again[2] == whole[2] and any(whole[2]) == optim.startswith("paged")
