"""Puts a saved adapter on its base model, after checking that it fits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def put_adapter(model: "nn.Module", folder: Path, *, is_trainable: bool, name: str = "default") -> "PeftModel":
    """The adapter in `folder` on top of `model`, which may have others, under `name`.

    Raises:
        ModelError: the adapter was made for a model with other layers or sizes, or PEFT cannot read it.
    """
    import peft

    _check_fit(unwrap(model), folder / "adapter_model.safetensors")
    try:
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), name, is_trainable=is_trainable)
            return model
        return peft.PeftModel.from_pretrained(model, str(folder), name, is_trainable=is_trainable)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError("the adapter cannot be loaded", where=str(folder), found=str(error),
                         expected="an adapter saved by PEFT for this model", fix="check that it belongs to this model"
                         ) from error


def _check_fit(model: "nn.Module", weights: Path) -> None:
    """Compare each factor's shape with the layer it goes on: A is [r, K], B is [N, r]."""
    from safetensors import safe_open

    modules: dict[str, Any] = dict(model.named_modules())
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            path, factor, _ = key.removeprefix("base_model.model.").partition(".lora_")
            side = key.rpartition(".lora_")[2][:1]
            if not factor or side not in "AB" or key.rpartition(".lora_")[2].startswith("embedding"):
                continue
            layer = modules.get(path)
            size = getattr(layer, "in_features" if side == "A" else "out_features", None)
            shape = file.get_slice(key).get_shape()
            got = shape[1] if side == "A" else shape[0]
            if layer is None or (size is not None and got != size):
                raise ModelError("the adapter was made for another model", where=f"{weights.parent}, {key}",
                                 found=f"{'inputs' if side == 'A' else 'outputs'}: {got}",
                                 expected="no such layer here" if layer is None else f"{size}, as in this model",
                                 fix="load it on the model named in its adapter_config.json")
