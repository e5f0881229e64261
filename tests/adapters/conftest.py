"""A tiny random model of any family."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny("llama") is a random model of that family in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama", **options: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 2}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | options))).eval()

    return make
