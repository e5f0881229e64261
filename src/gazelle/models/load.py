"""Loads a model and its tokenizer from a folder, a hub name, a GGUF file or an adapter, checked and ready to train."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.load import put_adapter
from gazelle.base.errors import ModelError, OptionError, nearest
from gazelle.base.log import logger
from gazelle.models import options
from gazelle.models.checkpoint import Checkpoint, check_finite, find_checkpoint, read_json, weight_files
from gazelle.models.context import can_stretch, context_limit, fit_context
from gazelle.models.finite import summed_while_quantised
from gazelle.models.record import read_record
from gazelle.models.special_tokens import align_special_tokens
from gazelle.quantize.bnb import forbid_repacking, hush_int8_casts

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PASSED_ON = ("attn_implementation",)
_NO_LENGTH = 10**9  # transformers' tokenizers state such a length if they have none


def load_model(model_name: str, *, max_seq_length: int | None = None, dtype: "str | torch.dtype | None" = None,
               load_in_4bit: bool | None = None, load_in_8bit: bool = False, full_finetuning: bool = False,
               quant_method: str = "nf4", token: str | None = None,
               device_map: "str | torch.device | dict[str, Any] | None" = None, revision: str | None = None,
               trust_remote_code: bool = False, is_trainable: bool = True, cache_dir: str | None = None,
               local_files_only: bool = False, **kwargs: Any) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer.

    Args:
        model_name: a model folder, a hub name, a `.gguf` file, or the folder or hub name of a PEFT adapter.
        max_seq_length: tokens per sequence. Longer than the model was made for: linear rotary scaling. Left out:
            2048, or the model's limit if shorter; for an adapter of a stretched model, as far as that was stretched.
            Kept as `model.max_seq_length`.
        dtype: what to compute in, such as "bfloat16"; None for what suits the device, "auto" for the checkpoint's own.
        load_in_4bit: keep the linear weights in 4 bits. Left out: yes, unless 8 bits or full fine-tuning is asked for;
            for an adapter that comes with a record (`record_base`), as they were kept in training.
        load_in_8bit: keep the linear weights in 8 bits (LLM.int8, https://arxiv.org/abs/2208.07339).
        full_finetuning: train all weights, which rules out quantised ones.
        quant_method: "nf4" (https://arxiv.org/abs/2305.14314) or "fp4", with the scales quantised as well.
        token: a hub access token.
        device_map: a device, a device map, or "auto". Left out: the first accelerator, else the CPU.
        revision: hub branch, tag or commit.
        trust_remote_code: run code that comes with the checkpoint.
        is_trainable: for an adapter: go on training it.
        cache_dir: the hub's download folder.
        local_files_only: never ask the hub.
        **kwargs: `attn_implementation`, as in transformers; `torch_dtype`, the earlier name of `dtype`.

    Raises:
        ModelError: the checkpoint is missing, damaged, pickled, or holds NaN.
        OptionError: an option that is unknown or cannot be had together with another or on this machine.
    """
    dtype = options.only_one(dtype, kwargs.pop("torch_dtype", None))
    if unknown := [name for name in kwargs if name not in _PASSED_ON]:
        known = [*inspect.signature(load_model).parameters, *_PASSED_ON]
        raise OptionError("unknown option for loading a model", where="load_model", found=unknown[0],
                          expected="an option it has", fix=nearest(unknown[0], known))
    bits = options.bits(load_in_4bit, load_in_8bit, full_finetuning, quant_method)
    place = options.device_map(device_map)
    wanted = options.dtype(dtype)
    hub = {"token": token, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir,
           "local_files_only": local_files_only}
    checkpoint = find_checkpoint(model_name, revision=revision, **hub)  # type: ignore[arg-type]
    base = checkpoint
    if checkpoint.adapter is not None:
        base = _base_of(checkpoint, hub)
    record = read_record(checkpoint.folder)
    run = record.get("run")
    if checkpoint.adapter is None:
        record = {}  # how a whole model is kept is for the caller to say
    if load_in_4bit is None and not load_in_8bit and not full_finetuning and "load_in_4bit" in record:
        bits = options.bits(record["load_in_4bit"], record.get("load_in_8bit", False), False, quant_method)
        quant_method = record.get("quant_method", quant_method)

    config = _config(base, trust_remote_code)
    if checkpoint.adapter is not None and max_seq_length is None:
        max_seq_length = _stretched(checkpoint, base, config, record)
    length = fit_context(config, max_seq_length)
    quantization = _quantization(config, bits, quant_method, wanted, full_finetuning)
    with summed_while_quantised() as sums:
        model = _weights(base, config, wanted, place, quantization, trust_remote_code, kwargs)
    for parameter in model.parameters():
        sums.add(parameter)
    if not sums.finite():
        check_finite(model.named_parameters(), base.name)
        _check_files(base, place)
    tokenizer = _tokenizer(checkpoint, base, trust_remote_code)
    if checkpoint.adapter is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # tokens were added before the adapter
    align_special_tokens(model, tokenizer)
    tokenizer.model_max_length = length
    model.max_seq_length, model.tokens_in_use = length, len(tokenizer)
    model.gazelle_tokenizer = tokenizer  # exports without one at hand take it, with the template it has by then
    model.gazelle_loading = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "quant_method": quant_method,
                             "max_seq_length": length}  # for record_base
    if checkpoint.adapter is not None:
        model = put_adapter(model, checkpoint.folder, is_trainable=is_trainable)
    model.gazelle_run = run  # for model cards
    return model, tokenizer


def load_tokenizer(model_name: str, *, token: str | None = None, revision: str | None = None,
                   trust_remote_code: bool = False) -> "tuple[PreTrainedTokenizerBase, PretrainedConfig]":
    """The tokenizer and the config of a model, as `load_model` takes them, without its weights.

    Raises:
        ModelError: the checkpoint is missing or damaged.
    """
    checkpoint, base = _without_weights(model_name, token, revision, trust_remote_code)
    return _tokenizer(checkpoint, base, trust_remote_code), _config(base, trust_remote_code)


def load_config(model_name: str, *, token: str | None = None, revision: str | None = None,
                trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of a model, as `load_model` takes it. Nothing but the config need be there.

    Raises:
        ModelError: it is missing or damaged.
    """
    return _config(_without_weights(model_name, token, revision, trust_remote_code)[1], trust_remote_code)


def _without_weights(model_name: str, token: str | None, revision: str | None,
                     trust_remote_code: bool) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint and its base, which is another one for an adapter."""
    hub: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code, "weights": False}
    checkpoint = find_checkpoint(model_name, revision=revision, **hub)
    return checkpoint, checkpoint if checkpoint.adapter is None else _base_of(checkpoint, hub)


def _base_of(checkpoint: Checkpoint, hub: dict[str, Any]) -> Checkpoint:
    adapter = checkpoint.adapter or {}
    name = adapter.get("base_model_name_or_path")
    if not name:
        raise ModelError("the adapter does not say which model it belongs to", where=checkpoint.name,
                         found="no base_model_name_or_path", expected="a model folder or hub name",
                         fix="write base_model_name_or_path into adapter_config.json")
    try:
        base = find_checkpoint(name, revision=adapter.get("revision"), **hub)
    except ModelError as error:
        raise ModelError("the model that this adapter belongs to cannot be found", where=checkpoint.name,
                         found=f"{name}: {error.what}", expected="the base model, whole",
                         fix="put it back, or correct base_model_name_or_path in adapter_config.json") from error
    if base.adapter is not None:
        raise ModelError("the adapter belongs to another adapter", where=checkpoint.name, found=name,
                         expected="a whole model as its base", fix="merge the other adapter first")
    return base


def _config(base: Checkpoint, trust_remote_code: bool) -> "PretrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, KeyError, TypeError, ArithmeticError, OSError) as error:
        raise ModelError("config.json cannot be used", where=base.name, found=str(error),
                         expected="a model type that transformers knows",
                         fix="update transformers, or pass trust_remote_code=True if you trust the repository's code"
                         ) from error


def _stretched(checkpoint: Checkpoint, base: Checkpoint, config: "PretrainedConfig",
               record: dict[str, Any]) -> int | None:
    """The length to which the model was stretched when the adapter was trained, or None if it was not."""
    limit = context_limit(config)
    length = record.get("max_seq_length")
    if length is None:
        # Without a record the tokenizer tells, in which the length is kept too. Some base models' own tokenizers state
        # a length above the model's limit: that is no stretch.
        length = _stated_length(checkpoint.folder)
        if length == _stated_length(base.folder) or not can_stretch(config):
            return None
    if limit is None or length is None or not limit < length < _NO_LENGTH:
        return None
    logger.info("The adapter was trained at %d tokens, beyond the model's %d.", length, limit)
    return length


def _stated_length(folder: Path) -> int | None:
    path = folder / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.exists() else None
    return length if isinstance(length, int) else None


def _quantization(config: "PretrainedConfig", bits: int, method: str, dtype: Any,
                  full: bool) -> "BitsAndBytesConfig | None":
    hush_int8_casts()
    earlier = getattr(config, "quantization_config", None)
    if earlier is not None:
        kind = earlier.get("quant_method", "unknown") if isinstance(earlier, dict) else earlier.quant_method
        if full:
            raise OptionError("this checkpoint is quantised, and quantised weights cannot be trained",
                              where="full_finetuning", found=f"{kind} weights", expected="an unquantised checkpoint",
                              fix="load the original model, or leave out full_finetuning")
        logger.info("The checkpoint is quantised already (%s); it is used as it is.", kind)
        return None
    if not bits:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=compute)


def _check_files(base: Checkpoint, place: Any) -> None:
    """Look for NaN in the files: the quantised weights do not show it."""
    from safetensors import safe_open

    device = place.get("", "cpu") if isinstance(place, dict) else "cpu"
    for path in weight_files(base.folder):
        with safe_open(path, framework="pt", device=device) as file:
            check_finite(((name, file.get_tensor(name)) for name in file.keys()), base.name)  # noqa: SIM118


def _weights(base: Checkpoint, config: "PretrainedConfig", dtype: Any, place: Any,
             quantization: "BitsAndBytesConfig | None", trust_remote_code: bool,
             passed_on: dict[str, Any]) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    if quantization is not None:
        passed_on = passed_on | {"quantization_config": quantization}
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                base.folder, config=config, dtype=dtype, device_map=place, use_safetensors=True,
                trust_remote_code=trust_remote_code, output_loading_info=True, **passed_on)
    except ImportError as error:
        raise ModelError("the model needs a package that is not here", where=base.name, found=str(error),
                         expected="the package that reads its weights", fix="install the package it names") from error
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError("the model cannot be loaded", where=base.name, found=str(error),
                         expected="weights that fit config.json", fix="check that all files come from one checkpoint"
                         ) from error
    forbid_repacking(model)
    if missing := sorted(report["missing_keys"]):
        raise ModelError("tensors are missing from the weights", where=base.name,
                         found=f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" * (len(missing) > 3)),
                         expected=f"all tensors of {type(model).__name__}",
                         fix="check that config.json and the weights come from one checkpoint")
    model.config._name_or_path = model.name_or_path = base.name  # what an adapter writes down as its base
    return model


def _tokenizer(checkpoint: Checkpoint, base: Checkpoint, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    own = (checkpoint.folder / "tokenizer_config.json").exists()
    source = checkpoint if own else base
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise ModelError("the tokenizer cannot be loaded", where=source.name, found=str(error),
                         expected="tokenizer.json and tokenizer_config.json beside the weights",
                         fix="copy the tokenizer files of the model into the folder") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; what matters in them is checked and raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
