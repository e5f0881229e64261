"""A run that was cut goes on to the bit: losses and weights of every step after it are those of the unbroken run."""

import gc
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.train.conftest import ROWS, small_llama
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import OptionError
from gazelle.train.checkpoint import SLACK

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = [row | {"input": f"number {number}"} for number, row in enumerate((ROWS * 2)[:10])]
Run = Callable[..., tuple[list[float], str]]


@pytest.fixture(scope="module")
def four_bits(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """QLoRA models, in NF4 on the CPU."""
    folder = tmp_path_factory.mktemp("base")
    small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2).save_pretrained(folder)

    def make() -> Any:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
        torch.manual_seed(7)
        return dropped(model)

    return make


def dropped(model: Any) -> Any:
    """With an adapter that draws random numbers in every step."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def run(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[Run]:
    """run(model, folder, **options): losses by step, and a hash of the trained weights."""

    def train(model: Any, name: str, resume: Any = None, callbacks: Any = None, **options: Any) -> Any:
        settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "max_length": 128, "report": False,
                    "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2,
                    "weight_decay": 0.1, "warmup_steps": 2, "output_dir": str(tmp_path / name)}
        trainer = SFTTrainer(model, SFTConfig(**(settings | options)), DATA, DATA[:2], bytes_tokenizer,
                             callbacks=callbacks)
        if resume:
            random.seed(99), np.random.seed(99), torch.manual_seed(99)
        train.trainer = trainer  # type: ignore[attr-defined]
        trainer.train(resume_from_checkpoint=resume)
        return ([entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                weights_hash(trainer.model))

    gc.freeze()  # each run ends with a search for garbage, which need not look through all that was ever imported
    yield train
    gc.unfreeze()


class SaveTwice(TrainerCallback):
    """Saves in the middle of the first of two epochs, and at its end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cuts = (max(1, state.max_steps // 4), state.max_steps // 2)
        control.should_save = state.global_step in self.cuts


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_resuming_is_exact(kind: str, packing: bool, accumulation: int, run: Run, four_bits: Callable[[], Any],
                           bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                           caplog: pytest.LogCaptureFixture) -> None:
    def model() -> Any:
        if kind == "qlora":
            return four_bits()
        base = small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2)
        return dropped(base) if kind == "lora" else base

    options = {"packing": packing, "gradient_accumulation_steps": accumulation, "max_length": 144 if packing else 128,
               "per_device_train_batch_size": 1 if packing or accumulation == 4 else 2}
    saves = SaveTwice()
    whole = run(model(), "whole", callbacks=[saves], **options)
    advisor = run.trainer._advisor
    assert [finding.kind for finding in advisor.findings] == ["too little data"]
    caplog.clear()
    middle, boundary = saves.cuts
    assert 0 < middle < boundary < len(whole[0])
    for cut in saves.cuts:
        (tmp_path / str(cut)).mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", tmp_path / str(cut) / f"checkpoint-{cut}")
        assert run(model(), str(cut), resume=True, **options) == whole
        assert run.trainer._checkpoints.resumed == tmp_path / str(cut) / f"checkpoint-{cut}"
        assert run.trainer._advisor.findings == advisor.findings
        assert (run.trainer._advisor.watch.curves["loss"] == advisor.watch.curves["loss"]).all()
    assert "Advice at" not in caplog.text  # it was said before the cut


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd", "adamw_torch"])
def test_every_kind_of_optimizer(optim: str, run: Run, bytes_tokenizer: PreTrainedTokenizerBase,
                                 tmp_path: Path) -> None:
    """Also where logging, evaluation and saving fall on different steps, with a schedule that watches the loss."""
    options = {"optim": optim, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
               "save_steps": 2, "metric_for_best_model": "eval_loss", "load_best_model_at_end": True,
               "lr_scheduler_type": "reduce_lr_on_plateau" if optim == "sgd" else "cosine"}

    def train(name: str, resume: bool) -> Any:
        stopping = EarlyStoppingCallback(9)
        found = run(dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2)), name, resume=resume,
                    callbacks=[stopping], **options)
        history = [{key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")
                    if key in entry} for entry in run.trainer.state.log_history]
        return found, history, stopping.early_stopping_patience_counter

    whole = train("whole", False)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    assert train("cut", True) == whole
    files = {path.name for path in (tmp_path / "cut" / "checkpoint-2").iterdir()}
    assert not [name for name in files if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    assert {"optimizer.json", "scheduler.json", "process-0.safetensors", "run.json", "manifest.json"} <= files
    layout = json.loads((tmp_path / "cut" / "checkpoint-2" / "optimizer.json").read_text())["layout"]
    assert layout == ("parameters" if optim == "adafactor" else "flat")
    if optim == "adamw_8bit":  # what is asked for before there is a checkpoint to go by
        before, written = run.trainer._checkpoints._needed(tmp_path), tmp_path / "cut" / "checkpoint-2"
        assert 0 <= before - SLACK < sum(path.stat().st_size for path in written.iterdir()) < before


def test_what_the_adapter_does_not_hold_comes_back_too(run: Run, bytes_tokenizer: PreTrainedTokenizerBase,
                                                       tmp_path: Path) -> None:
    """Norms of the base model that the caller set free, and callbacks with a state of their own."""
    def model() -> Any:
        adapted = dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2))
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
        return adapted

    class Counting(TrainerCallback):
        def __init__(self) -> None:
            self.seen = torch.zeros(2)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    counting = Counting()
    whole = run(model(), "whole", callbacks=[SaveTwice(), counting])
    (tmp_path / "2").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "2" / "checkpoint-2")
    again = Counting()
    assert run(model(), "2", resume=str(tmp_path / "2" / "checkpoint-2"), callbacks=[again]) == whole
    assert again.seen.tolist() == counting.seen.tolist() == [10, 10]

    class Unsaveable(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {object()}}

    with pytest.raises(OptionError, match=r"(?s)cannot be saved.*Unsaveable.state_dict\(\).seen is a set"):
        run(model(), "3", callbacks=[Unsaveable()])
    Counting.load_state_dict = None  # a callback that only has state_dict keeps its state to itself
    del Counting.load_state_dict
    run(model(), "4", callbacks=[Counting()])


def test_checkpoints_that_transformers_wrote(run: Run, bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                                             caplog: pytest.LogCaptureFixture) -> None:
    """They go on as they would there; what does not fit is refused."""
    model = dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2))
    rows = [{"input_ids": list(range(5, 15)), "labels": list(range(5, 15))}] * 4
    arguments = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "report_to": "none",
                 "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "weight_decay": 0.1}
    Trainer(model, TrainingArguments(output_dir=str(tmp_path / "theirs"), **arguments), train_dataset=rows).train()
    saved = weights_hash(model)
    assert (tmp_path / "theirs" / "checkpoint-2" / "optimizer.pt").exists()
    fresh = dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2))
    run(fresh, "ours", resume=str(tmp_path / "theirs" / "checkpoint-2"), max_steps=2, num_train_epochs=1)
    assert weights_hash(fresh) == saved  # nothing left to do
    assert "has no manifest to verify it by" in caplog.text
    run(fresh, "ours", resume=str(tmp_path / "theirs" / "checkpoint-1"), max_steps=4, save_strategy="steps",
        save_steps=1)
    assert run.trainer.state.global_step == 4
    assert not run.trainer._held.flats  # their optimizer saw parameters one by one
    first = run.trainer.optimizer.state_dict()["state"][0]["step"]
    assert first == 4
    run(fresh, "ours", resume=True, max_steps=5, save_strategy="steps", save_steps=1)  # and so does ours from then on
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, tmp_path / "theirs" / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(OptionError, match="does not fit this run"):
        run(dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2)), "ours",
            resume=str(tmp_path / "theirs" / "checkpoint-2"), max_steps=4)


def test_what_does_not_fit_is_refused(run: Run, bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def model() -> Any:
        return dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2))

    run(model(), "whole", max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(OptionError, match="another optimizer"):
        run(model(), "whole", resume=True, max_steps=2, optim="lion_8bit")
    other = model()
    for name, parameter in other.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with pytest.raises(OptionError, match="other trained parameters"):
        run(other, "whole", resume=True, max_steps=2)
    run(model(), "light", max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    with pytest.raises(OptionError, match="no state of training"):
        run(model(), "light", resume=True, max_steps=2)


def test_the_best_model_is_kept(run: Run, bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                                caplog: pytest.LogCaptureFixture) -> None:
    class Best(TrainerCallback):
        """The evaluation of step 2 is made the best."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_loss"] = 0.1 if state.global_step == 2 else 1.0

    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
               "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    model = dropped(small_llama(bytes_tokenizer, adapter=False, num_hidden_layers=2))
    run(model, "out", callbacks=[Best()], **options)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert run.trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    best = weights_hash(model)
    (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    run(model, "out", resume=True, callbacks=[Best()], **options)
    assert "The best model is not loaded" in caplog.text and weights_hash(model) != best
