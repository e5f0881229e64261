"""A tiny random model with the demo model's tokenizer, in memory and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_tiny(demo_tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(demo_tokenizer), max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=demo_tokenizer.eos_token_id, pad_token_id=demo_tokenizer.pad_token_id)).eval()


@pytest.fixture
def tiny(demo_tokenizer: Any) -> LlamaForCausalLM:
    return make_tiny(demo_tokenizer)


@pytest.fixture
def tiny_folder(demo_tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    make_tiny(demo_tokenizer).save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    return folder
