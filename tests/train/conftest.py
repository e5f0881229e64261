"""A tiny random Llama with the demo model's tokenizer, and rows to train on."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.data.conftest import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from gazelle import SFTConfig, SFTTrainer
from gazelle.data.templates import TEMPLATES, get_template

ROWS = [
    {"instruction": f"What is the {noun} of gauge {number}?", "input": "", "output": answer}
    for number, (noun, answer) in enumerate(
        [("colour", "Gauge zero is teal."), ("weight", "It weighs forty-one grams and a half."),
         ("price", "Nine."), ("maker", "The maker of gauge three is Halvorsen & Daughters, in the old mill."),
         ("shelf", "Shelf B, on the left, behind the red crate."), ("voltage", "Twelve volts."),
         ("age", "It was made in the spring of 1987, as the plate says."), ("owner", "Mrs. Okonkwo owns it.")]
    )
]


def with_adapter(model: Any) -> Any:
    """With LoRA on all linears whose B is not zero, so that every gradient flows."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


@pytest.fixture
def tiny(demo_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """Makes equal models: same weights, same adapter, non-zero B so that every gradient flows."""

    def make(adapter: bool = True) -> Any:
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
            pad_token_id=demo_tokenizer.pad_token_id, eos_token_id=demo_tokenizer.eos_token_id, bos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        model.generation_config.pad_token_id = demo_tokenizer.pad_token_id
        if not adapter:
            return model
        return with_adapter(model)

    return make


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """A few hundred tokens, so that steps are quick."""
    return small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")


def small_llama(tokenizer: PreTrainedTokenizerBase, *, adapter: bool = True, **options: Any) -> Any:
    """Equal models of three layers for a small tokenizer."""
    torch.manual_seed(6)
    model = LlamaForCausalLM(LlamaConfig(**({
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id} | options)))
    if not adapter:
        return model
    return with_adapter(model)


@pytest.fixture
def quick(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[Callable[..., SFTTrainer]]:
    """Trainers of three short steps with two micro-batches each, of equal models if none is given."""

    def make(model: Any = None, **options: Any) -> SFTTrainer:
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                    "max_length": 128, "report": False, "disable_tqdm": True, "save_strategy": "no",
                    "logging_steps": 1, "learning_rate": 1e-2, "output_dir": str(tmp_path / "out")}
        return SFTTrainer(small_llama(bytes_tokenizer) if model is None else model, SFTConfig(**(settings | options)),
                          ROWS, ROWS[:2], processing_class=bytes_tokenizer)

    gc.freeze()  # each run ends with a search for garbage, which need not look through all that was ever imported
    yield make
    gc.unfreeze()
