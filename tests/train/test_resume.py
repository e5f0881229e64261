"""A run that was cut goes on to the bit: losses and weights of every step after it are those of the unbroken run."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from tests.train.conftest import ROWS, small_llama, with_adapter
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
from gazelle.train import saving
from gazelle.train.checkpoint import fault, seal

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = [row | {"input": f"number {number}"} for number, row in enumerate(ROWS * 2)]
Run = Callable[..., tuple[list[float], str]]


@pytest.fixture(scope="module")
def four_bits(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """QLoRA models, in NF4 on the CPU."""
    folder = tmp_path_factory.mktemp("base")
    small_llama(bytes_tokenizer, adapter=False).save_pretrained(folder)

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

    yield train


class SaveAt(TrainerCallback):
    """Saves at these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_resuming_is_exact(kind: str, packing: bool, accumulation: int, run: Run, four_bits: Callable[[], Any],
                           bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def model() -> Any:
        if kind == "qlora":
            return four_bits()
        base = small_llama(bytes_tokenizer, adapter=False)
        return dropped(base) if kind == "lora" else base

    options = {"packing": packing, "gradient_accumulation_steps": accumulation,
               "per_device_train_batch_size": 2 if accumulation == 1 else 1}
    epoch = 8 if accumulation == 1 else 4
    if packing:
        options |= {"max_length": 192, "per_device_train_batch_size": 1}
    whole = run(model(), "whole", callbacks=[SaveAt(1, 2, 4, 8)], **options)
    steps = len(whole[0])
    epoch = steps // 2
    assert epoch >= 2
    for cut in (1 if epoch == 2 else 2, epoch):
        assert (cut == epoch) == (cut % epoch == 0)
        if not (tmp_path / "whole" / f"checkpoint-{cut}").exists():
            run(model(), "whole", callbacks=[SaveAt(cut)], **options)
        (tmp_path / str(cut)).mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", tmp_path / str(cut) / f"checkpoint-{cut}")
        assert run(model(), str(cut), resume=True, **options) == whole
        assert run.trainer._checkpoints.resumed == tmp_path / str(cut) / f"checkpoint-{cut}"
