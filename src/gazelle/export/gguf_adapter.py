"""Exports a LoRA adapter alone to a GGUF file that llama.cpp puts on its base model.

Shape legend: N outputs, K inputs, R rank. Facts: llama.cpp's src/llama-adapter.cpp.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.factors import Factors, lora_factors
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.base.files import check_writable, staged_file
from gazelle.export.checks import check_no_folder, text_config
from gazelle.export.gguf import HEADER, tensor_names, title_of
from gazelle.export.gguf_families import Family, converted, family_of, fields_of
from gazelle.export.gguf_file import GgufOutput
from gazelle.export.gguf_tokenizer import template_fields
from gazelle.models.checkpoint import check_finite
from gazelle.models.save import check_space

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def export_gguf_adapter(model: Any, tokenizer: "PreTrainedTokenizerBase", path: str | Path) -> Path:
    """Write the active LoRA adapter of `model` to the file `path`, in float32. The model in memory stays as it is.

    llama.cpp puts it on a GGUF file of the base: `llama-server -m base.gguf --lora adapter.gguf`, in Ollama `ADAPTER`.
    That file is the one it was trained on if it is exported with the adapter switched off:
    `with model.disable_adapter(): export_gguf(model, …)`.

    Args:
        model: of a family in `gguf_families.FAMILIES`, with LoRA or rsLoRA. Several active adapters become one.
        tokenizer: its chat template goes into the file.
        path: a name that ends in .gguf.

    Returns:
        The file.

    Raises:
        OptionError: the model has no adapter.
        ModelError: an adapter that is more than factors, such as DoRA or trained tokens; one on an embedding that is
            the head as well; factors with NaN or infinity; a model that cannot be written as GGUF.
        OutputError: the file cannot be written, or the disk is too full.
    """
    target = Path(path).expanduser().absolute()
    base = unwrap(model)
    config = text_config(base)
    family = family_of(config)
    fields_of(config, family)  # what llama.cpp cannot compute on the base is an error here as well
    factors = lora_factors(model)
    tied = bool(getattr(base, "all_tied_weights_keys", {})) or family.tied
    names = tensor_names(config, family, tied)
    alpha = next((float(part.scale * part.rank) for part in factors if part.scale), 1.0)
    tensors = [tensor for part in factors for tensor in _tensors(part, names, family, config, alpha, tied)]
    check_finite(tensors, "the adapter")
    check_writable(target.parent)
    check_no_folder(target)
    check_space(target.parent, HEADER + sum(tensor.nbytes for _, tensor in tensors))
    target.parent.mkdir(parents=True, exist_ok=True)
    fields = {"general.type": "adapter", "general.name": title_of(tokenizer, base, target), "general.file_type": 0,
              "adapter.type": "lora", "adapter.lora.alpha": alpha} | template_fields(tokenizer)
    with staged_file(target) as staging:
        output = GgufOutput(staging, family.architecture, fields)
        try:
            for name, tensor in tensors:
                output.announce(name, tuple(tensor.shape), "f32")
            output.begin()
            for name, tensor in tensors:
                output.write(name, tensor)
        finally:
            output.close()
    return target


def _tensors(part: Factors, names: dict[str, tuple[str, tuple[int, ...]]], family: Family, config: Any, alpha: float,
             tied: bool) -> "list[tuple[str, Tensor]]":
    """A layer's two factors as llama.cpp keeps them, which scales all layers by alpha / R."""
    name = f"{part.path}.weight"
    if name not in names or (part.embedding and tied):
        raise ModelError("llama.cpp cannot put an adapter on this layer" if name not in names else
                         "llama.cpp has one matrix for the embedding and the head", where=part.path,
                         found="an adapter on one of the two" if tied else "an adapter",
                         expected="adapters on the layers of attention and MLP", fix="export the merged model instead")
    b = part.b * (part.scale * part.rank / alpha)
    if part.embedding:  # rows are gathered from a, so it lies the other way round
        return [(f"{names[name][0]}.lora_a", part.a.T.contiguous()), (f"{names[name][0]}.lora_b", b)]
    # The rows of the weight are those of b.
    return [(f"{names[name][0]}.lora_a", part.a.contiguous()),
            (f"{names[name][0]}.lora_b", converted(name, b, family, config).contiguous())]
