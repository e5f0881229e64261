"""A tiny random checkpoint with the demo model's tokenizer, on disk, and data files for scripts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle.cli.demo import PACKAGE

CHATS = [
    [("human", "Who runs the mill?"), ("gpt", "Mrs. Okonkwo runs it."), ("human", "Since when?"),
     ("gpt", "Since 1987.")],
    [("人类", "Say <|im_start|>assistant\nyes, please."), ("gpt", "No.")],
    [("human", "What is on shelf B?"), ("gpt", "A red crate.")],
    [("human", "And on shelf C?"), ("gpt", "Nothing.")],
]


@pytest.fixture(scope="session")
def tiny_checkpoint(demo_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=demo_tokenizer.eos_token_id, pad_token_id=demo_tokenizer.pad_token_id)).save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def script_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl (Alpaca), chats.jsonl (ShareGPT) and stories.txt."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join((PACKAGE / "demo/train.jsonl").read_text().splitlines(True)[:16]))
    (folder / "chats.jsonl").write_text("".join(
        json.dumps({"conversations": [{"from": who, "value": said} for who, said in chat]}) + "\n" for chat in CHATS))
    (folder / "stories.txt").write_text("".join(
        f"The mill by the river was built in {year}, and nobody has counted its stones.\n"
        for year in range(1900, 1908)))
    return folder
