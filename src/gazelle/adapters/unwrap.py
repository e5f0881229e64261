"""The model under an adapter."""

from typing import Any


def unwrap(model: Any) -> Any:
    """The Hugging Face model that PEFT wrapped, or `model` itself if it has no adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
