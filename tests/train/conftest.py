"""A tiny random Llama with the demo model's tokenizer, and rows to train on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

ROWS = [
    {"instruction": f"What is the {noun} of gauge {number}?", "input": "", "output": answer}
    for number, (noun, answer) in enumerate(
        [("colour", "Gauge zero is teal."), ("weight", "It weighs forty-one grams and a half."),
         ("price", "Nine."), ("maker", "The maker of gauge three is Halvorsen & Daughters, in the old mill."),
         ("shelf", "Shelf B, on the left, behind the red crate."), ("voltage", "Twelve volts."),
         ("age", "It was made in the spring of 1987, as the plate says."), ("owner", "Mrs. Okonkwo owns it.")]
    )
]


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
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return peft

    return make
