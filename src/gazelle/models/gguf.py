"""Turns a GGUF file into a Hugging Face checkpoint in the cache, once; later loads find it there.

The cache holds float32. ggml's formats multiply 16-bit scales by small integers, and the products fit no 16-bit type:
storing them narrower would train a model that is not the one in the file.
"""

import hashlib
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import ModelError, OutputError
from gazelle.base.files import cache_folder, staged_folder
from gazelle.base.log import logger
from gazelle.models.gguf_families import FAMILIES, Family, base_config, unpermute
from gazelle.models.gguf_file import GgufFile, read_gguf
from gazelle.models.gguf_tokenizer import end_of_turn_ids, gguf_tokenizer
from gazelle.models.shards import ShardWriter

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_FORMAT = 1  # raise it when the conversion changes, so that older caches are not used
_SHARD_BYTES = 4 << 30
_UNUSED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # part of the config


def convert_gguf(path: Path) -> Path:
    """The folder with `path` as a float32 safetensors checkpoint; converts it if that has not been done yet.

    Raises:
        ModelError: a damaged file, or a family that is not known.
        OutputError: the cache cannot be written to or the disk is full.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{_digest(path)}"
    if not (folder / "config.json").exists():
        file = read_gguf(path)
        if file.get("split.count", int, 1) > 1:
            raise ModelError("this GGUF file is one part of several", where=str(path),
                             found=f"split.count {file.metadata['split.count']}", expected="a whole model in one file",
                             fix="join the parts: llama-gguf-split --merge first-part.gguf whole.gguf")
        family = FAMILIES.get(file.architecture)
        if family is None:
            raise ModelError("this kind of GGUF model is not supported", where=str(path), found=file.architecture,
                             expected="one of " + ", ".join(FAMILIES), fix="use the model's safetensors checkpoint")
        _check_space(file, folder)
        logger.info("Unpacking %s to %s (once).", path.name, folder)
        with staged_folder(folder) as staging:
            _write(file, family, staging)
    return folder


def _digest(path: Path) -> str:
    """Names the content without reading gigabytes: size, time of change, first and last MB."""
    status = path.stat()
    digest = hashlib.sha256(f"{_FORMAT} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, status.st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _check_space(file: GgufFile, folder: Path) -> None:
    nearest = next(parent for parent in folder.parents if parent.exists())
    needed = 4 * sum(prod(entry.shape) for entry in file.tensors.values())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise OutputError("not enough disk space to unpack the GGUF file", where=str(folder),
                          found=f"{free:,} bytes free", expected=f"{needed:,} bytes",
                          fix="make room, or set GAZELLE_CACHE to a folder on another disk")


def _write(file: GgufFile, family: Family, folder: Path) -> None:
    from transformers import GenerationConfig

    tokenizer = gguf_tokenizer(file)
    tokenizer.save_pretrained(folder)
    config = _config(file, family)
    config.update({f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    _write_weights(file, family, config, folder)
    stops = end_of_turn_ids(file)
    generation = GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id,
                                  eos_token_id=stops if len(stops) > 1 else config.eos_token_id)
    generation.save_pretrained(folder)
    config.save_pretrained(folder)


def _config(file: GgufFile, family: Family) -> "PretrainedConfig":
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.for_model(family.model_type, **(base_config(file) | family.extras(file)))
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError("the settings in the GGUF file make no model", where=str(file.path), found=str(error),
                         expected=f"settings of {family.model_type}", fix="download or export the file again"
                         ) from error
    config.dtype = torch.float32
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
    return config


def _write_weights(file: GgufFile, family: Family, config: "PretrainedConfig", folder: Path) -> None:
    writer = ShardWriter(folder, _SHARD_BYTES)
    for gguf_name, name in _names(file, config).items():
        writer.add(name, _weight(file, gguf_name, family, config))
    writer.close()


def _names(file: GgufFile, config: "PretrainedConfig") -> dict[str, str]:
    """GGUF tensor name -> Hugging Face parameter name, one to one: nothing missing, nothing left over."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}  # a tied head is left out
    names: dict[str, str] = {}
    for hf in shapes:
        stem, _, suffix = hf.rpartition(".")
        names[f"{table.get_name(stem)}.{suffix}"] = hf
    missing = [name for name in names if name not in file.tensors]
    extra = [name for name in file.tensors if name not in names and name not in _UNUSED]
    if missing or extra:
        raise ModelError("the tensors in the GGUF file are not those of its family", where=str(file.path),
                         found=f"missing: {missing[:3] or 'none'}, not expected: {extra[:3] or 'none'}",
                         expected=f"the tensors of {type(model).__name__}", fix="use the safetensors checkpoint")
    for name, hf in names.items():
        if file.tensors[name].shape != shapes[hf]:
            raise ModelError("a tensor has the wrong shape", where=f"{file.path}, {name}",
                             found=file.tensors[name].shape, expected=str(shapes[hf]), fix="export the file again")
    return names


def _weight(file: GgufFile, name: str, family: Family, config: Any) -> "torch.Tensor":
    import torch

    weight = file.read(name)
    if family.permuted and ".attn_q." in name:
        weight = unpermute(weight, config.num_attention_heads)
    elif family.permuted and ".attn_k." in name:
        weight = unpermute(weight, config.num_key_value_heads)
    elif family.norms_plus_one and name.endswith("norm.weight"):
        weight = weight - 1
    return torch.from_numpy(weight.copy() if not weight.flags.writeable else weight)
