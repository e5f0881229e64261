"""Exports a model to GGUF files that llama.cpp and all that build on it run, without llama.cpp.

Tensors are merged, converted and quantised one at a time, for all files at once, so that the host holds little more
than the largest one in float32. Files are written beside their places and renamed when all are whole.
"""

import contextlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazelle.adapters.merge import merged_tensors
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.base.files import check_writable, staged_file
from gazelle.base.log import logger
from gazelle.base.progress import tell
from gazelle.export.checks import check_no_folder, text_config
from gazelle.export.gguf_families import Family, check_bias, converted, family_of, fields_of
from gazelle.export.gguf_file import GgufOutput, file_fields
from gazelle.export.gguf_recipe import Recipe, Shape, find_recipes, kind_of
from gazelle.export.gguf_tokenizer import tokenizer_fields
from gazelle.export.importance import imatrix_fields, importance_of
from gazelle.models.checkpoint import check_finite
from gazelle.models.load import quiet
from gazelle.models.outline import meta_model
from gazelle.models.save import check_readable, check_space, still_tied
from gazelle.models.special_tokens import stop_ids
from gazelle.quantize.gguf import KINDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}
HEADER = 1 << 20  # allowed for metadata besides the vocabulary, which is counted


def export_gguf(model: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path,
                methods: str | list[str] = "q8_0", *, calibration: Any = None, add_bos: bool | None = None
                ) -> list[Path]:
    """Write `model` to `folder` as `model-Q8_0.gguf` and the like. The model in memory stays as it is.

    Args:
        model: of a family in `gguf_families.FAMILIES`, with or without an adapter, quantised by bitsandbytes or not.
        tokenizer: the one it was trained with; its chat template goes into the file.
        folder: made if need be. Files of other names in it stay.
        methods: one of `gguf_recipe.RECIPES` or several, as a list or separated by commas.
        calibration: rows that show which columns of each weight matter most, in any form that `read_rows` takes.
        add_bos: whether programs put BOS before a text; left out, they do as the tokenizer does.

    Returns:
        The files, in the order of `methods`.

    Raises:
        OptionError: an unknown method.
        DataError: calibration rows that cannot be read.
        ModelError: a model, adapter or tokenizer that cannot be written as GGUF, or weights with NaN or infinity; then
            and at any other error earlier files in the folder are what they were.
        OutputError: the folder cannot be written to, or the disk is too full.
    """
    target = Path(folder).expanduser().absolute()
    recipes = find_recipes(methods)
    base = unwrap(model)
    config = text_config(base)
    family = family_of(config)
    fields, extra = fields_of(config, family)
    check_readable(base)
    check_writable(target)
    tied = _tied(model, base, family)
    names = tensor_names(config, family, tied)
    ends = [*stop_ids(getattr(base, "generation_config", None)), *stop_ids(base.config)]
    fields |= tokenizer_fields(tokenizer, names["model.embed_tokens.weight"][1][0], ends)
    if add_bos is not None:
        fields["tokenizer.ggml.add_bos_token"] = add_bos
    shape = Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, tied,
                  _seventy_b(config), calibration is not None)
    paths = [target / f"model-{name.upper()}.gguf" for name in recipes]
    for path in paths:
        check_no_folder(path)
    check_space(target, sum(_size(recipe, names, shape, fields) for recipe in recipes.values()))
    importance: dict[str, Tensor] = {}
    if calibration is not None and any(KINDS[recipe.kind].searched for recipe in recipes.values()):
        importance, rows = importance_of(model, tokenizer, calibration)
        importance = {names[name][0]: values for name, values in importance.items() if name in names}
        fields |= imatrix_fields(calibration, rows, len(importance))
    elif calibration is not None:
        logger.warning("calibration changes nothing in %s: these formats do not choose what to round well.",
                       ", ".join(recipes))
    target.mkdir(parents=True, exist_ok=True)
    with _outputs(paths, list(recipes.values()), family, fields, title_of(tokenizer, base, target)) as outputs:
        for output, recipe in zip(outputs, recipes.values(), strict=True):
            for name, tensor in extra.items():
                output.announce(name, tuple(tensor.shape), "f32")
            for name, size in names.values():
                output.announce(name, size, kind_of(name, size, recipe, shape))
            output.begin()
            for name, tensor in extra.items():
                output.write(name, tensor)
        for number, (name, weight) in enumerate(_weights(model, names, family, config)):
            tell(name, number, len(names))
            for output in outputs:
                output.write(name, weight, importance.get(name))
    return paths


def _weights(model: Any, names: dict[str, tuple[str, tuple[int, ...]]], family: Family, config: "PretrainedConfig"
             ) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and the float32 values of each tensor, in the order of `names`."""
    expected = iter(names)
    for name, tensor in merged_tensors(model):
        if name not in names:
            continue
        target, shape = names[name]
        if name != next(expected) or tuple(tensor.shape) != shape:
            raise ModelError("a weight is not where config.json puts it", where=name, found=tuple(tensor.shape),
                             expected=str(shape), fix="load the model from an unchanged checkpoint")
        weight = tensor.to("cpu", torch.float32)
        del tensor
        check_finite([(name, weight)], "the merged model")
        yield target, converted(name, weight, family, config)
    if (missing := next(expected, None)) is not None:
        raise ModelError("a weight is not in the model", where=missing, found="none of this name",
                         expected=str(names[missing][1]), fix="load the model from an unchanged checkpoint")


@contextlib.contextmanager
def _outputs(paths: list[Path], recipes: list[Recipe], family: Family, fields: dict[str, Any], title: str
             ) -> Iterator[list[GgufOutput]]:
    """Open files beside `paths` that get their names together, when the block has ended without an error."""
    with contextlib.ExitStack() as renames, contextlib.ExitStack() as open_files:
        outputs = []
        for path, recipe in zip(paths, recipes, strict=True):
            staging = renames.enter_context(staged_file(path))
            output = GgufOutput(staging, family.architecture, file_fields(recipe, title) | fields)
            open_files.callback(output.close)
            outputs.append(output)
        yield outputs


def tensor_names(config: "PretrainedConfig", family: Family, tied: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name -> llama.cpp's name and the shape, in the order in which `merged_tensors` gives them."""
    import gguf

    plain = type(config).from_dict({key: value for key, value in config.to_dict().items()
                                    if key != "quantization_config"})
    with quiet():
        skeleton = meta_model(plain, torch.float32)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name, tensor in merged_tensors(skeleton):
        stem, _, suffix = name.rpartition(".")
        if not (tied and stem == "lm_head"):
            check_bias(name, family)
            names[name] = f"{table.get_name(stem)}.{suffix}", tuple(tensor.shape)
    return names


def _tied(model: Any, base: Any, family: Family) -> bool:
    """Whether the head is the embedding, after merging as well."""
    tied = still_tied(model, dict(getattr(base, "all_tied_weights_keys", {})))
    if family.tied and not tied:
        raise ModelError("llama.cpp takes the embedding of this kind of model as its head", where="lm_head.weight",
                         found="a head of its own", expected="a head equal to the embedding",
                         fix="train neither lm_head nor embed_tokens, or export to safetensors: save_pretrained_merged")
    return tied


def _size(recipe: Recipe, names: dict[str, tuple[str, tuple[int, ...]]], shape: Shape, fields: dict[str, Any]) -> int:
    """Bytes of a file, a little more rather than less."""
    total = HEADER
    for name, size in names.values():
        total += KINDS[kind_of(name, size, recipe, shape)].row(prod(size)) + len(name) + 96
    for value in fields.values():
        if isinstance(value, list):
            total += sum(len(item.encode()) + 8 if isinstance(item, str) else 8 for item in value)
    return total


def _seventy_b(config: "PretrainedConfig") -> bool:
    grouped = config.num_attention_heads != config.num_key_value_heads
    return config.num_hidden_layers == 80 and (config.model_type == "qwen2"
                                               or (config.model_type in ("llama", "mistral") and grouped))


def title_of(tokenizer: Any, base: Any, target: Path) -> str:
    """The model's name. Where that says Phi-3, llama.cpp looks for its tokens and has special ones swallow spaces."""
    name = Path(getattr(base.config, "_name_or_path", "") or target).name
    named = "phi-3" in name.lower() or "phi3" in name.lower()
    strips = any(token.special and token.rstrip for token in tokenizer.added_tokens_decoder.values()) \
        and _PHI3_TOKENS.issubset(tokenizer.get_vocab())
    if named == strips:
        return name
    return f"Phi-3 {name}" if strips else "model"
