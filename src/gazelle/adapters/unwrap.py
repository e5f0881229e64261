"""The model under an adapter, and the adapter on it."""

from typing import Any


def unwrap(model: Any) -> Any:
    """The Hugging Face model that PEFT wrapped, or `model` itself if it has no adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_state(model: Any) -> dict[str, Any]:
    """The tensors that PEFT writes into the files of a model's adapters, sharing the model's memory."""
    from peft import get_peft_model_state_dict

    return {f"{adapter}.{name}": tensor for adapter in model.peft_config
            for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter,
                                                          save_embedding_layers=False).items()}
