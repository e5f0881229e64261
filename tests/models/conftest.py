"""Tiny random models of each family, and a tokenizer that fits them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
          "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "phi3": {"sliding_window": 5, "original_max_position_embeddings": 128},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 2.0},
    "smollm3": {"num_hidden_layers": 4},
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny("llama") is a random model of that family in float32; norms and biases are random as well."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama", **options: Any) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SIZES | EXTRAS.get(family, {}) | options))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.normal_(std=0.3).add_(1)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """Makes a byte-level tokenizer of 300 tokens with ChatML and the given special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **options: Any) -> Any:
        tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "Ġt", "hell"]
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                       [("h", "e"), ("l", "l"), ("Ġ", "t"), ("he", "ll")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        options = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        tokenizer.chat_template = CHATML
        return tokenizer

    return make


@pytest.fixture
def checkpoint(tiny: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "checkpoint"
    tiny().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
