"""Writes a model to disk: merged into one checkpoint, plain or in four bits, or its adapter alone."""

import contextlib
import copy
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazelle.adapters.merge import merged_tensors
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError, OutputError, nearest
from gazelle.base.files import check_writable, free_bytes, make_readable, staged_folder
from gazelle.models.card import is_empty_form, is_untouched
from gazelle.models.plain import inner_linears, plain_model
from gazelle.models.record import RECORD, record_base
from gazelle.models.saved import REPORT, CheckpointOutput, SaveReport
from gazelle.models.shards import ShardWriter
from gazelle.quantize.bnb import is_quantized_linear, pack_nf4

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

METHODS = ("merged_16bit", "merged_4bit", "lora")
QUANTISED = ("fp8", "awq", "gptq")  # of `export.quantised`, which stands above
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VLLM_FILES = ("serve.sh", "vllm.json")  # written beside a model that is exported for vLLM
# What a saved model consists of. Anything else in the output folder is somebody's work.
_OURS = ("config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors",
         "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", RECORD, "tokenizer.json",
         "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates", REPORT,
         "verification.json", *VLLM_FILES)
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_merged(model: Any, tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path, *,
                save_method: str = "merged_16bit", max_shard_size: str | int = "5GB",
                dtype: "str | torch.dtype | None" = None) -> SaveReport:
    """Write `model` to `folder`, which appears whole or not at all. The model in memory stays as it is.

    Merging takes W + s·B·A in float32 one layer at a time and rounds once, so it needs memory for one shard. The
    result loads in plain `AutoModelForCausalLM.from_pretrained`, an adapter in `PeftModel.from_pretrained`.

    Args:
        model: a model with or without an adapter, quantised or not.
        tokenizer: written beside it, with its chat template.
        folder: an earlier saved model there is replaced when the new one is complete.
        save_method: "merged_16bit" for a whole model, "merged_4bit" for one whose linear layers bitsandbytes keeps in
            NF4 (https://arxiv.org/abs/2305.14314), quantised after merging; "lora" for the adapter alone.
        max_shard_size: bytes a file, or a text such as "5GB".
        dtype: of the merged weights: "bfloat16", "float16" or "float32". Left out: float16 if the model is, else
            bfloat16, which holds any float32 weight without overflow.

    Returns:
        What was written, and how far each tensor is from the merged one, as in `save_report.json` beside the weights;
        for an adapter its size alone.

    Raises:
        OptionError: an unknown method, dtype or size; "lora" for a model without an adapter.
        OutputError: the folder cannot be written to, holds the base model, an adapter where a merged model is to go
            (or the reverse) or other files, or the disk is too full.
        ModelError: the adapter is of a kind that cannot be merged, the weights are quantised in a way that cannot be
            read back, or a tensor holds NaN or infinity.
    """
    target = Path(folder).expanduser().absolute()
    if save_method not in METHODS:
        raise OptionError("no such way to save a model", where="save_method", found=save_method,
                          expected=" or ".join(METHODS), fix=nearest(save_method, METHODS))
    kept_as, limit = checked_options(dtype, max_shard_size, model)
    check_target(model, target, save_method)
    if save_method == "lora":
        return _save_adapter(model, tokenizer, target)
    linears = inner_linears(plain_model(model)) if save_method == "merged_4bit" else {}
    with saved_checkpoint(model, tokenizer, target, save_method, dtype=kept_as, limit=limit,
                          few_bits=sum(linear.weight.numel() for linear in linears.values()),
                          quantization=_nf4_config(kept_as) if linears else None) as (output, tensors):
        for name, tensor in tensors:
            if name.removesuffix(".weight") not in linears or not name.endswith(".weight"):
                output.add(name, tensor)
                continue
            weight = output.rounded(name, tensor)
            parts, kept = pack_nf4(weight)
            output.add_quantised(name, tensor, kept, parts)
    return output.report


@contextlib.contextmanager
def saved_checkpoint(model: Any, tokenizer: "PreTrainedTokenizerBase | None", target: Path, method: str, *,
                     dtype: torch.dtype, limit: int, few_bits: int = 0, quantization: dict[str, Any] | None = None
                     ) -> Iterator[tuple[CheckpointOutput, Iterator[tuple[str, Tensor]]]]:
    """A folder that takes its name when the block ends without an error: weights, configs, tokenizer and a report.

    Args:
        model: with or without an adapter.
        tokenizer: written beside the weights, with its chat template.
        target: the folder, which has been checked.
        method: for the report.
        dtype: of the weights.
        limit: bytes of a file.
        few_bits: how many of the numbers are going to take less than a byte, for the room that is looked for.
        quantization: config.json's `quantization_config`.

    Yields:
        Where to write, and the merged tensors in order, of tied ones those that are to be written.

    Raises:
        OutputError: the disk is too full.
        ModelError: quantised weights that cannot be read back, or settings for generation that contradict each other.
    """
    began = time.perf_counter()
    base = unwrap(model)
    check_readable(base)
    generation = checked_generation(base)
    check_space(target, (_numel(base) - few_bits) * dtype.itemsize + few_bits)
    tied_names = dict(getattr(base, "all_tied_weights_keys", {}))
    tied = still_tied(model, tied_names)
    report = SaveReport(target, method, str(dtype).removeprefix("torch."))
    with staged_folder(target) as staging:
        writer = ShardWriter(staging, limit)
        with _plain_conversions(base):
            yield (CheckpointOutput(base, dtype, writer, report),
                   ((name, tensor) for name, tensor in merged_tensors(model) if not (tied and name in tied_names)))
        writer.close()
        write_config(base, dtype, tied, quantization, staging)
        if generation is not None:
            generation.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        report.bytes = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
        report.seconds = time.perf_counter() - began
        (staging / REPORT).write_text(report.as_json(), encoding="utf-8")


def checked_options(dtype: "str | torch.dtype | None", max_shard_size: str | int, model: Any
                    ) -> tuple[torch.dtype, int]:
    """The type of the weights and the bytes of a file.

    Raises:
        OptionError: no such type or size.
    """
    return _dtype(dtype, model), _bytes(max_shard_size)


def _dtype(dtype: "str | torch.dtype | None", model: Any) -> torch.dtype:
    if dtype is None:
        return torch.float16 if model.config.dtype in (torch.float16, "float16") else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError("weights cannot be saved in this type", where="dtype", found=dtype,
                          expected=", ".join(_DTYPES), fix=nearest(name, _DTYPES))
    return _DTYPES[name]


def _bytes(size: str | int) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise OptionError("this is not a size", where="max_shard_size", found=repr(size),
                          expected='bytes, or a text such as "5GB"', fix="change max_shard_size")
    return max(1, int(float(match[1]) * _SIZES[match[2].upper()]))


def check_target(model: Any, target: Path, save_method: str) -> None:
    """Raise `OutputError` if `target` cannot be written to, or holds what would be lost."""
    check_writable(target)
    source = Path(str(getattr(model.config, "_name_or_path", "") or "."))
    if target.exists() and source.is_dir() and (source / "config.json").exists() and source.samefile(target):
        raise OutputError("this folder holds the model that was loaded", where=str(target), found="the base model",
                          expected="another folder", fix="choose another output folder")
    present = sorted(target.iterdir()) if target.exists() else []
    names = {entry.name for entry in present}
    lost, kept = ("config.json", "a model") if save_method == "lora" else ("adapter_config.json", "an adapter")
    if lost in names:
        raise OutputError(f"the folder holds {kept}, which would be lost", where=str(target), found=lost,
                          expected="a new folder, or one with a model saved in the same way",
                          fix="choose a folder of its own for each")
    others = [entry.name for entry in present if not _is_ours(entry)]
    if others:
        raise OutputError("the folder holds other files, which would be lost", where=str(target),
                          found=", ".join(sorted(others)), expected="a new folder, or one with a saved model alone",
                          fix="choose a folder of its own for the model")


def _is_ours(entry: Path) -> bool:
    if entry.name == "README.md":  # ours, or the empty form that PEFT writes; anything else is somebody's text
        text = entry.read_text(encoding="utf-8", errors="replace")
        return is_untouched(text) or is_empty_form(text)
    return any(entry.match(name) for name in _OURS)


def check_readable(base: Any) -> None:
    """Raise `ModelError` if the weights of `base`, a model without its adapter, are quantised past reading back."""
    settings = getattr(base.config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    kind = str(getattr(method, "value", method))
    if settings is not None and not kind.startswith("bitsandbytes"):
        raise ModelError("the weights are quantised in a way that cannot be merged", where="save_method",
                         found=f"{kind} weights", expected="unquantised or bitsandbytes weights",
                         fix='save the adapter alone with save_method="lora", or load the original model')


def checked_generation(base: Any) -> "GenerationConfig | None":
    """What is written as generation_config.json: settings that need sampling switch it on, as transformers asks.

    Raises:
        ModelError: settings that contradict each other.
    """
    config: GenerationConfig | None = copy.deepcopy(base.generation_config)
    if config is None:
        return None
    try:
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
            config.validate(strict=True)
    except ValueError as error:
        raise ModelError("the settings for generation contradict each other", where="model.generation_config",
                         found=str(error), expected="settings that transformers can save",
                         fix="correct model.generation_config") from error
    return config


def check_space(target: Path, needed: int) -> None:
    """Raise `OutputError` if the disk on which `target` lies, or will lie, has less than `needed` bytes free."""
    free = free_bytes(target)
    if needed > free:
        raise OutputError("not enough disk space for the model", where=str(target), found=f"{free:,} bytes free",
                          expected=f"{needed:,} bytes", fix="make room, or choose a folder on another disk")


def _numel(base: Any) -> int:
    """Values in the merged model, give or take an adapter's."""
    sizes = {}
    for module in base.modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            quantized = is_quantized_linear(module)
            sizes[id(weight)] = module.in_features * module.out_features if quantized else weight.numel()
    return sum(sizes.values())


def _save_adapter(model: Any, tokenizer: "PreTrainedTokenizerBase | None", target: Path) -> SaveReport:
    if not hasattr(model, "peft_config"):
        raise OptionError("the model has no adapter to save", where="save_method", found='"lora"',
                          expected="a model with an adapter", fix='use save_method="merged_16bit"')
    with staged_folder(target) as staging:
        # New tokens are in the adapter row by row; PEFT would ask the hub whether to write whole embeddings besides.
        model.save_pretrained(str(staging), save_embedding_layers=False)
        make_readable(staging / "adapter_model.safetensors")
        record_base(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        size = (staging / "adapter_model.safetensors").stat().st_size
    return SaveReport(target, "lora", "", bytes=size)


@contextlib.contextmanager
def _plain_conversions(base: Any) -> Iterator[None]:
    """Hide how a quantised checkpoint was read: the tensors written are plain, and that has no reverse."""
    conversions = getattr(base, "_weight_conversions", None)
    if not conversions:
        yield
        return
    base._weight_conversions = [conversion for conversion in conversions if not any(
        hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))]
    try:
        yield
    finally:
        base._weight_conversions = conversions


def still_tied(model: Any, tied_names: dict[str, str]) -> bool:
    """Whether the tied weights are equal after merging: an adapter on one end alone unties them."""
    if not tied_names:
        return False
    found = dict(merged_tensors(model, only={*tied_names, *tied_names.values()}))
    return all(torch.equal(found[target], found[source]) for target, source in tied_names.items()
               if target in found and source in found)


def write_config(base: Any, dtype: torch.dtype, tied: bool, quantization: dict[str, Any] | None, folder: Path
                 ) -> None:
    """Write config.json for weights of the type `dtype`, plain or quantised, into `folder`."""
    config: PretrainedConfig = type(base.config).from_dict(base.config.to_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = dtype
    config.architectures = [type(base).__name__]
    if getattr(base, "all_tied_weights_keys", None) and not tied:
        config.get_text_config().tie_word_embeddings = False
        config.tie_word_embeddings = False
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)


def _nf4_config(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype).to_dict()
