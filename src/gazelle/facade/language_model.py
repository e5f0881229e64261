"""`FastLanguageModel`: the calls people type, bound to a model object."""

import inspect
import types
from typing import TYPE_CHECKING, Any

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.base.errors import OptionError, nearest
from gazelle.base.log import log_to_terminal, say_once
from gazelle.facade.exporting import loaded_tokenizer
from gazelle.models.load import load_model
from gazelle.models.record import record_base
from gazelle.models.requantize import quantize_model
from gazelle.models.save import METHODS, QUANTISED, save_merged

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gazelle.models.saved import SaveReport


class FastLanguageModel:
    """Loads models and puts adapters on them; never instantiated."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: "torch.dtype | str | None" = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        quant_method: str = "nf4",
        token: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        torch_dtype: "torch.dtype | str | None" = None,
        **options: Any,
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load a model and its tokenizer.

        Args:
            model_name: hub name, local folder, one GGUF file, or a folder that holds a PEFT adapter.
            max_seq_length: longest row in tokens; beyond the model's own limit its rotary positions are scaled.
                Default: 2048, or the model's limit if that is shorter.
            dtype: type of the 16-bit or 32-bit weights and of the computation; default: by device. `torch_dtype` is
                the older name.
            load_in_4bit: NF4 base weights with double quantisation, in bitsandbytes' storage (the default).
            load_in_8bit: int8 base weights.
            full_finetuning: every weight is trained; nothing is quantised.
            quant_method: "nf4" or "fp4".
            token: for gated or private hub models.
            device_map: one device, such as "cuda:0" or "cpu"; default: the best there is.
            revision: branch, tag or commit of a hub model.
            trust_remote_code: run Python code that comes with the checkpoint.
            **options: names that other libraries take and that mean nothing here are refused with the nearest one.

        Returns:
            The model, in inference mode of its cache and ready for `get_peft_model`, and its tokenizer.

        Raises:
            UserError: naming what was found, what was expected and what to do, before any weight is loaded.
        """
        log_to_terminal()
        model, tokenizer = load_model(
            model_name, max_seq_length=max_seq_length, dtype=dtype, torch_dtype=torch_dtype,
            load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, full_finetuning=full_finetuning,
            quant_method=quant_method, token=token, device_map=device_map, revision=revision,
            trust_remote_code=trust_remote_code, **options,
        )
        return bind(model), tokenizer

    @staticmethod
    def get_peft_model(
        model: "PreTrainedModel",
        r: int = 16,
        target_modules: list[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "auto",
        random_state: int = 3407,
        use_rslora: bool = False,
        loftq_config: dict[str, Any] | None = None,
        layers_to_transform: list[int] | None = None,
        modules_to_save: list[str] | None = None,
        use_dora: bool = False,
        max_seq_length: int | None = None,
        **options: Any,
    ) -> "PeftModel":
        """Put a LoRA adapter on a model.

        Args:
            model: from `from_pretrained`, or any Hugging Face causal model.
            r: rank.
            target_modules: names of linear layers, in the fused or the split spelling; default: all but the head.
            lora_alpha: the adapter is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with `use_rslora`.
            lora_dropout: dropout on the adapter's input.
            bias: "none", "all" or "lora_only".
            use_gradient_checkpointing: "auto" ("unsloth" means the same), True, False, or "offload": layers' inputs
                wait in host memory.
            random_state: seed of the adapter's initial values.
            use_rslora: rank-stabilised scale.
            loftq_config: as in PEFT; None for the ordinary start at zero.
            layers_to_transform: indices of the layers to adapt; default: all.
            modules_to_save: modules trained in full and saved with the adapter, such as "lm_head".
            use_dora: weight-decomposed adapter.
            max_seq_length: taken because scripts pass it; the length was settled when the model was loaded.
            **options: further fields of `peft.LoraConfig`.

        Raises:
            OptionError: for a name, number or module that does not fit, with those that would.
        """
        log_to_terminal()
        if max_seq_length is not None and max_seq_length != getattr(model, "max_seq_length", max_seq_length):
            say_once(f"get_peft_model(max_seq_length={max_seq_length}) has no effect: pass it to from_pretrained")
        return bind(add_lora(
            model, r=r, target_modules=target_modules, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,
            use_gradient_checkpointing=use_gradient_checkpointing, random_state=random_state, use_rslora=use_rslora,
            loftq_config=loftq_config, layers_to_transform=layers_to_transform, modules_to_save=modules_to_save,
            use_dora=use_dora, **options,
        ))

    @staticmethod
    def for_inference(model: "PreTrainedModel") -> "PreTrainedModel":
        """Switch to answering: evaluation mode, cache on, no checkpointing. Returns the same model."""
        model.resume_checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
        model.gradient_checkpointing_disable()
        model.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: "PreTrainedModel") -> "PreTrainedModel":
        """Switch back to training mode, with checkpointing if it was on before. Returns the same model."""
        if getattr(model, "resume_checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        return model.train()


def bind(model: Any) -> Any:
    """Give a model object the methods that people call on it. Nothing but this one object changes."""
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    model.save_pretrained_gguf = types.MethodType(_save_pretrained_gguf, model)
    model.save_pretrained_merged = types.MethodType(_save_pretrained_merged, model)
    model.quantize = types.MethodType(_quantize, model)
    model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)
    return model


def _save_pretrained(self: "PreTrainedModel", save_directory: str, *args: Any, save_format: str = "safetensors",
                     **options: Any) -> None:
    """As in transformers or, for an adapter, PEFT; or with `save_format="gguf"` as `save_pretrained_gguf`.

    Added tokens are saved with an adapter as rows of their own, so a resized embedding need not be saved whole.
    """
    if save_format == "gguf":
        _save_pretrained_gguf(self, save_directory, *args, **options)
        return
    if save_format != "safetensors":
        raise OptionError("there is no such format to save a model in", where="save_format", found=save_format,
                          expected="safetensors or gguf", fix=nearest(save_format, ("safetensors", "gguf")))
    if hasattr(self, "peft_config"):
        type(self).save_pretrained(self, str(save_directory), *args, **{"save_embedding_layers": False} | options)
        record_base(self, save_directory)
    else:
        type(self).save_pretrained(self, save_directory, *args, **options)


def _save_pretrained_gguf(
    self: "PreTrainedModel",
    save_directory: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    quantization_method: str | list[str] = "q8_0",
) -> "list[Path]":
    """Write GGUF files for llama.cpp, Ollama and LM Studio, such as `model-Q4_K_M.gguf`; an adapter is merged first.

    Args:
        save_directory: made if need be; other files in it stay. Each file appears whole or not at all.
        tokenizer: written into the files. Left out: the one that the model was loaded with.
        quantization_method: "q4_k_m", "q8_0", "f16" or another one of llama.cpp's names, or a list of them.

    Returns:
        The files.
    """
    from gazelle.export.gguf import export_gguf

    if tokenizer is None:
        tokenizer = loaded_tokenizer(self)
    return export_gguf(self, tokenizer, save_directory, quantization_method)


def _save_pretrained_merged(
    self: "PreTrainedModel",
    save_directory: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    save_method: str = "merged_16bit",
    max_shard_size: str = "5GB",
    **options: Any,
) -> "SaveReport":
    """Write a checkpoint that plain transformers loads, or the adapter alone ("lora").

    Args:
        save_directory: written beside and renamed into place; an earlier folder stays until then.
        tokenizer: saved with the model. For "awq" and "gptq" left out: the one that the model was loaded with.
        save_method: "merged_16bit"; "merged_4bit", NF4 of bitsandbytes; "fp8", "awq" or "gptq", in the format of
            compressed-tensors, which vLLM reads too; or "lora". What is quantised is merged first.
        max_shard_size: largest weight file, such as "4GB".
        **options: `dtype` to write another type than the model's 16-bit one. For "awq" and "gptq" `calibration`, data
            like the training data (left out: text that the model writes), with `rows` and `length` of it; for "gptq"
            `act_order`.

    Returns:
        How far each tensor is from the merged one, and more; it lies beside the weights as `save_report.json`.
    """
    if save_method not in QUANTISED:
        methods = (*METHODS, *QUANTISED)
        if save_method not in METHODS:
            raise OptionError("no such way to save a model", where="save_method", found=save_method,
                              expected=", ".join(methods), fix=nearest(str(save_method), methods))
        _check_options(options, save_merged)
        return save_merged(self, tokenizer, save_directory, save_method=save_method, max_shard_size=max_shard_size,
                           **options)
    from gazelle.export.quantised import save_quantised

    _check_options(options, save_quantised)
    if tokenizer is None and save_method != "fp8":
        tokenizer = loaded_tokenizer(self)
    return save_quantised(self, tokenizer, save_directory, save_method, max_shard_size=max_shard_size, **options)


def _check_options(options: dict[str, Any], function: "Callable[..., Any]") -> None:
    known = {name for name, parameter in inspect.signature(function).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY}
    if unknown := sorted(options.keys() - known):
        raise OptionError("unknown option for saving a model in this way", where="save_pretrained_merged",
                          found=unknown[0], expected=", ".join(sorted(known)), fix=nearest(unknown[0], known))


def _quantize(self: "PreTrainedModel", dtype: "str | torch.dtype" = "float16") -> "PreTrainedModel":
    """Keep the model in fewer bits from now on, in place; an adapter stays beside it as it is.

    Args:
        dtype: torch.float16 or torch.bfloat16, to which everything is cast, or "nf4" or "int8", in which bitsandbytes
            keeps the linear layers, the head apart.

    Returns:
        The same model.

    Raises:
        OptionError: no such type.
        ModelError: the model is quantised already.
    """
    quantize_model(self, dtype)
    return self


def _resize_token_embeddings(self: "PreTrainedModel", new_num_tokens: int, mean_resizing: bool = True) -> Any:  # noqa: ARG001
    """As in transformers; added rows start as the mean of all, are trained with the adapter and saved with it."""
    return resize_token_embeddings(self, new_num_tokens)
