"""A folder from which vLLM serves a model, with the command that does."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError, OutputError, nearest
from gazelle.base.files import check_writable, staged_folder
from gazelle.export.quantised import save_quantised
from gazelle.models.context import context_limit
from gazelle.models.load import load_config
from gazelle.models.save import QUANTISED, VLLM_FILES, check_target, checked_generation, save_merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCRIPT, SETTINGS = VLLM_FILES
_DTYPES = {"float16": "float16", "fp16": "float16", "half": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
           "float32": "float32", "fp32": "float32"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's kernels are made for
# Of an adapter's config: what vLLM does not do, and the value that it has if it is not asked for.
_NOT_SERVED = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None,
               "trainable_token_indices": None, "layer_replication": None}


def export_vllm(model: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path, *,
                quantization: str | None = None, calibration: Any = None, max_batch_size: int = 8,
                dtype: "str | torch.dtype" = "float16", merge: bool = True) -> list[Path]:
    """Write what vLLM needs to serve `model`. The folder appears whole or not at all.

    It holds the merged checkpoint, or with `merge=False` the adapter in `adapter/` and its base in `base/`, unless
    the base lies unquantised in a folder or on the hub, where it is served from. Beside them lie `serve.sh`, which
    runs `vllm serve` on the loopback address, and `vllm.json` with the same command and its settings.

    Args:
        model: with or without an adapter, quantised by bitsandbytes or not.
        tokenizer: written beside the weights, with its chat template.
        folder: an earlier export there is replaced when the new one is complete.
        quantization: None for 16 bits, "fp8", "awq" or "gptq", as in `save_quantised`.
        calibration: for awq and gptq, data like the training data; left out: text that the model itself writes.
        max_batch_size: requests that vLLM answers at a time.
        dtype: of weights and computation: "float16", "bfloat16", or without quantisation "float32".
        merge: False serves the adapter on its base, so that others can be served beside it.

    Returns:
        The files.

    Raises:
        OptionError: an option out of range, or `merge=False` for a model without an adapter.
        ModelError: an adapter that vLLM cannot serve by itself, or as `save_merged` and `save_quantised`.
        OutputError: the folder cannot be written to, or holds other files.
    """
    target = Path(folder).expanduser().absolute()
    kept_as = _checked(model, quantization, max_batch_size, dtype, merge)
    check_target(model, target, "merged_16bit") if merge else _check_adapter_target(model, target)
    settings: dict[str, Any] = {
        "dtype": kept_as, "max-num-seqs": max_batch_size, "max-model-len": _length(model), "host": "127.0.0.1"}
    with staged_folder(target) as staging:
        if merge:
            _save(model, tokenizer, staging, quantization, calibration, kept_as)
            served, settings["served-model-name"] = ".", target.name
        else:
            served = _save_parts(model, tokenizer, staging, quantization, calibration, kept_as)
            settings |= {"served-model-name": f"{target.name}-base", "max-lora-rank": _rank(model)}
        _write_command(staging, target, served, settings, quantization, adapter=not merge)
    return sorted(path for path in target.rglob("*") if path.is_file())


def serve_command(folder: str | Path) -> str:
    """The command that serves what `export_vllm` wrote, to be run from any folder."""
    return str(json.loads((Path(folder).expanduser() / SETTINGS).read_text(encoding="utf-8"))["command"])


def _checked(model: Any, quantization: str | None, batch: int, dtype: "str | torch.dtype", merge: bool) -> str:
    """The name of the type."""
    if quantization not in (None, *QUANTISED):
        raise OptionError("no such way to quantise for vLLM", where="quantization", found=quantization,
                          expected="None, " + ", ".join(QUANTISED), fix=nearest(str(quantization), QUANTISED))
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise OptionError("a value out of range", where="max_batch_size", found=batch, expected="at least 1",
                          fix="change max_batch_size")
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError("vLLM does not compute in this type", where="dtype", found=dtype,
                          expected="float16, bfloat16 or float32", fix=nearest(name, _DTYPES))
    if quantization is not None and _DTYPES[name] == "float32":
        raise OptionError("steps are kept in 16 bits", where="dtype", found=dtype, expected="float16 or bfloat16",
                          fix="change dtype")
    if not merge:
        _check_adapter(model)
    return _DTYPES[name]


def _check_adapter(model: Any) -> None:
    if not hasattr(model, "peft_config"):
        raise OptionError("the model has no adapter to serve", where="merge", found="merge=False",
                          expected="a model with an adapter", fix="leave merge out")
    if len(model.active_adapters) != 1:
        raise ModelError("several adapters are active at a time", where="merge", found=", ".join(model.active_adapters),
                         expected="one adapter", fix="activate one, or leave merge=False out")
    config = _adapter_config(model)
    for name, usual in _NOT_SERVED.items():
        if getattr(config, name, usual) not in (usual, [], {}):
            raise ModelError("vLLM cannot serve this adapter by itself", where="merge",
                             found=f"{name}={getattr(config, name)!r}", expected=f"{name}={usual!r}",
                             fix="leave merge=False out: the adapter is then merged into the model")
    _rank(model)


def _adapter_config(model: Any) -> Any:
    return model.peft_config[model.active_adapters[0]]


def _rank(model: Any) -> int:
    """The least rank that vLLM knows and the adapter fits in."""
    config = _adapter_config(model)
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > _RANKS[-1]:
        raise ModelError("the adapter's rank is too high for vLLM", where="merge", found=rank,
                         expected=f"at most {_RANKS[-1]}", fix="leave merge=False out: the adapter is then merged")
    return next(least for least in _RANKS if least >= rank)


def _check_adapter_target(model: Any, target: Path) -> None:
    check_writable(target)
    ours = {"adapter", "base", SCRIPT, SETTINGS}
    present = {entry.name for entry in target.iterdir()} if target.exists() else set()
    for name, method in (("adapter", "lora"), ("base", "merged_16bit")):
        if name in present:
            check_target(model, target / name, method)
    if present and (SETTINGS not in present or present - ours):
        raise OutputError("the folder holds other files, which would be lost", where=str(target),
                          found=", ".join(sorted(present - ours or present)),
                          expected="a new folder, or one with an earlier export like this one",
                          fix="choose a folder of its own")


def _length(model: Any) -> int:
    """Tokens of a conversation, question and answer: as in training, and no more than positions are made for."""
    base = unwrap(model)
    limit = context_limit(base.config.get_text_config())
    length = getattr(base, "max_seq_length", None) or limit or 2048
    return min(length, limit) if limit else length


def _save(model: Any, tokenizer: Any, folder: Path, quantization: str | None, calibration: Any, dtype: str) -> None:
    if quantization is None:
        save_merged(model, tokenizer, folder, dtype=dtype)
    else:
        save_quantised(model, tokenizer, folder, quantization, calibration=calibration, dtype=dtype)


def _save_parts(model: Any, tokenizer: Any, staging: Path, quantization: str | None, calibration: Any, dtype: str
                ) -> str:
    """Write the adapter, and its base if that has to be; returns where the base is served from."""
    save_merged(model, tokenizer, staging / "adapter", save_method="lora")
    base = unwrap(model)
    if quantization is None and _lies_elsewhere(base):
        if (generation := checked_generation(base)) is not None:
            generation.save_pretrained(staging / "adapter")  # stops as in training
        return str(base.config._name_or_path)
    with model.disable_adapter():
        _save(model, tokenizer, staging / "base", quantization, calibration, dtype)
    return "base"


def _lies_elsewhere(base: Any) -> bool:
    """True if the base can be served from where it was loaded: a folder or the hub, not quantised, nothing changed."""
    name = str(getattr(base.config, "_name_or_path", "") or "")
    if getattr(base.config, "quantization_config", None) is not None:
        return False
    if not (Path(name) / "config.json").is_file() and (Path(name).exists() or name.count("/") != 1):
        return False
    there, here = load_config(name).get_text_config(), base.config.get_text_config()
    return all(getattr(there, key, None) == getattr(here, key, None)
               for key in ("vocab_size", "max_position_embeddings", "rope_parameters"))


def _write_command(staging: Path, target: Path, served: str, settings: dict[str, Any], quantization: str | None, *,
                   adapter: bool) -> None:
    def command(folder: Path) -> list[str]:
        inside = served in (".", "base")
        given = dict(settings)
        if adapter:
            given["lora-modules"] = f"{target.name}={folder / 'adapter'}"
            if not inside:  # template and stops are those of training, which the base need not have
                given |= {"tokenizer": str(folder / "adapter"), "generation-config": str(folder / "adapter")}
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        return ["vllm", "serve", str(folder / served) if inside else served, *options,
                *(["--enable-lora"] if adapter else [])]

    script = staging / SCRIPT
    script.write_text("#!/bin/sh\n# Serves this model, on this machine alone; further options are passed on to vLLM.\n"
                      f'cd "$(dirname "$0")" && exec {shlex.join(command(Path()))} "$@"\n', encoding="utf-8")
    script.chmod(script.stat().st_mode | 0o111)
    content = {"command": shlex.join(command(target)), "quantization": quantization, **settings}
    (staging / SETTINGS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
