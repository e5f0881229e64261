"""The plain Hugging Face model that a quantised or adapted one amounts to, without its weights."""

from typing import Any

import torch
from torch import nn

from gazelle.adapters.unwrap import unwrap
from gazelle.models.load import quiet
from gazelle.models.outline import meta_model


def plain_model(model: Any) -> Any:
    """A model of the same class and config on the meta device: no adapter, no quantised layers, nothing swapped."""
    config = unwrap(model).config
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    with quiet():
        return meta_model(type(config).from_dict(settings), torch.float32).eval()


def inner_linears(plain: Any) -> dict[str, nn.Linear]:
    """The linear layers by name, the head apart: those that checkpoints keep in few bits."""
    head = plain.get_output_embeddings()
    return {name: module for name, module in plain.named_modules()
            if isinstance(module, nn.Linear) and module is not head}
