"""How many pages of a cache there is room for."""

from typing import Any

import psutil
import torch

from gazelle.base.errors import ModelError
from gazelle.base.sizes import megabytes


def pages_for(inner: Any, tokens: int, size: int, *, exact: bool) -> int:
    """Pages of `size` tokens for a cache of `tokens`; of fewer if half of the free memory is less, unless `exact`.

    Raises:
        ModelError: not even 256 tokens have room.
    """
    count = -(-tokens // size)
    if exact:
        return count
    room = room_in_tokens(inner)
    if room < min(tokens, 256):
        raise ModelError("there is no memory for a cache of keys and values", where="cache_tokens",
                         found=f"room for {room} tokens in half of the free memory",
                         expected=f"{megabytes(bytes_per_token(inner))} a token",
                         fix="free memory, or load the model in fewer bits")
    return max(min(count, room // size), 1)


def room_in_tokens(inner: Any) -> int:
    """Tokens whose keys and values half of the free memory takes."""
    device = inner.get_input_embeddings().weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free // 2 // bytes_per_token(inner))


def bytes_per_token(inner: Any) -> int:
    """Bytes that keys and values of one token take in all layers."""
    config = inner.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    element = next(parameter.element_size() for parameter in inner.parameters() if parameter.is_floating_point())
    return 2 * config.num_hidden_layers * groups * width * element

