"""`FastLanguageModel`: the calls people type, bound to a model object."""

import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError, nearest
from gazelle.base.files import make_readable
from gazelle.base.log import log_to_terminal, say_once
from gazelle.facade.hub import push_to_hub, push_to_hub_gguf, push_to_hub_merged
from gazelle.facade.saving import loaded_tokenizer, save_checkpoint
from gazelle.models.load import load_model
from gazelle.models.precision import MixedPrecisionConfig, set_mixed_precision
from gazelle.models.record import record_base
from gazelle.models.requantize import quantize_model
from gazelle.train.ratio import set_ratio
from gazelle.train.strategies.incremental import Replay

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gazelle.models.saved import SaveReport


# What scripts written for Unsloth pass, and why it means nothing here.
_WITHOUT_EFFECT = {
    "use_amd_optim": "kernels are chosen by the device that is there",
    "rope_scaling": "max_seq_length stretches the model's positions where it has to",
    "fix_tokenizer": "special tokens are always brought in line with the model",
    "use_gradient_checkpointing": "pass it to get_peft_model or SFTConfig",
    "resize_model_vocab": "call model.resize_token_embeddings(len(tokenizer))",
    "random_state": "loading draws no random numbers; pass it to get_peft_model",
    "use_exact_model_name": "names are always taken as they are",
    "fast_inference": "there is no vLLM in the process; answers come from generate",
    "gpu_memory_utilization": "it belongs to fast_inference; training has memory_budget in SFTConfig",
    "float8_kv_cache": "it belongs to fast_inference",
    "max_lora_rank": "it belongs to fast_inference",
    "disable_log_stats": "it belongs to fast_inference",
    "unsloth_vllm_standby": "it belongs to fast_inference",
    "load_in_16bit": "it is what load_in_4bit=False means",
    "offload_embedding": "the memory plan decides where the embedding lies",
    "return_logits": "training never keeps logits",
    "fullgraph": "nothing is compiled by torch",
}
_ENDS = ("embed_tokens", "lm_head")


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
            **options: `attn_implementation`; names that scripts written for Unsloth pass and that mean nothing here
                are taken with a line in the log, any other is refused with the nearest one.

        Returns:
            The model, in inference mode of its cache and ready for `get_peft_model`, and its tokenizer.

        Raises:
            UserError: naming what was found, what was expected and what to do, before any weight is loaded.
        """
        log_to_terminal()
        for name in [name for name in options if name in _WITHOUT_EFFECT]:
            del options[name]
            say_once(f"from_pretrained({name}=…) has no effect: {_WITHOUT_EFFECT[name]}")
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
                embed_tokens and lm_head in a list are trained in full, as in `modules_to_save`.
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
        target_modules, modules_to_save = _ends_in_full(target_modules, modules_to_save)
        return bind(add_lora(
            model, r=r, target_modules=target_modules, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,
            use_gradient_checkpointing=use_gradient_checkpointing, random_state=random_state, use_rslora=use_rslora,
            loftq_config=loftq_config, layers_to_transform=layers_to_transform, modules_to_save=modules_to_save,
            use_dora=use_dora, **options,
        ))

    @staticmethod
    def set_mixed_precision(model: "PreTrainedModel", config: MixedPrecisionConfig) -> "PreTrainedModel":
        """Keep a model's parts in the types that `config` names. Returns the same model."""
        return set_mixed_precision(model, config)

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


def _ends_in_full(targets: list[str] | str | None, saved: list[str] | None) -> tuple[Any, list[str] | None]:
    """Scripts for continued pretraining list the embedding and the head among the targets, to train them in full."""
    if not isinstance(targets, list | tuple) or not (ends := [name for name in targets if name in _ENDS]):
        return targets, saved
    say_once(f"{' and '.join(ends)} among target_modules: trained in full and saved with the adapter")
    return [name for name in targets if name not in _ENDS], list(dict.fromkeys([*(saved or ()), *ends]))


def bind(model: Any) -> Any:
    """Give a model object the methods that people call on it. Nothing but this one object changes."""
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    model.save_pretrained_gguf = types.MethodType(_save_pretrained_gguf, model)
    model.save_pretrained_merged = types.MethodType(_save_pretrained_merged, model)
    model.push_to_hub = types.MethodType(push_to_hub, model)
    model.push_to_hub_merged = types.MethodType(push_to_hub_merged, model)
    model.push_to_hub_gguf = types.MethodType(push_to_hub_gguf, model)
    model.export_onnx = types.MethodType(_export_onnx, model)
    model.quantize = types.MethodType(_quantize, model)
    model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)
    model.gradient_checkpointing_enable = types.MethodType(_gradient_checkpointing_enable, model)
    model.fast_generate = types.MethodType(_fast_generate, model)
    model.load_lora = types.MethodType(_load_lora, model)
    model.enable_incremental_tuning = types.MethodType(_enable_incremental_tuning, model)
    return model


def _gradient_checkpointing_enable(
    self: "PreTrainedModel",
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    checkpoint_ratio: float | None = None,
    exclude_layers: list[str | int] | None = None,
    **options: Any,
) -> None:
    """As in transformers; or, with a ratio, make that share of the layers again and let the others keep everything.

    Args:
        gradient_checkpointing_kwargs: as in transformers.
        checkpoint_ratio: from 0 to 1, for a model that runs on the engine; the trainer's memory plan carries it out.
        exclude_layers: names or numbers of layers that keep everything.
        **options: as in transformers.
    """
    if checkpoint_ratio is not None:
        set_ratio(self, checkpoint_ratio, exclude_layers or ())
        return
    base = unwrap(self)
    type(base).gradient_checkpointing_enable(base, gradient_checkpointing_kwargs, **options)


def _enable_incremental_tuning(
    self: "PreTrainedModel",
    memory_size: int = 1000,
    replay_strategy: str = "balanced",
    regularization: float = 0.01,
    memory: str | None = None,
) -> None:
    """Train on one task after another without forgetting the first: each run replays rows of those before it.

    A run writes what it remembers to `replay.json` in its output folder, when it ends.

    Args:
        memory_size: rows kept at most.
        replay_strategy: "balanced", as many rows of every run; "random"; or "recent", the last run's.
        regularization: weight of the pull towards the weights before the run, from the second run on.
        memory: an earlier run's folder, to go on from in a new process.
    """
    unwrap(self).gazelle_replay = Replay(memory_size, replay_strategy, regularization, memory)


def _fast_generate(self: "PreTrainedModel", prompts: Any, sampling_params: Any = None,
                   tokenizer: "PreTrainedTokenizerBase | None" = None, **options: Any) -> Any:
    """Answer many prompts together: `model.fast_generate(prompts, max_new_tokens=64)[0].outputs[0].text`, as in vLLM.

    Args:
        prompts: texts, conversations or lists of ids, one or a list of them.
        sampling_params: vLLM's `SamplingParams`, a dict, or a `gazelle.generate.options.Sampling`.
        tokenizer: left out, the one that the model was loaded with.
        **options: as in `gazelle.generate.fast.fast_generate`: max_new_tokens, temperature, stop, schema, stream,
            lora_request and others.

    Returns:
        One `RequestOutput` for each prompt; with `stream=True` an iterator of pieces.
    """
    from gazelle.generate.fast import fast_generate

    return fast_generate(self, loaded_tokenizer(self) if tokenizer is None else tokenizer, prompts, sampling_params,
                         **options)


def _load_lora(self: "PreTrainedModel", path: "str | Path", **options: Any) -> Any:  # noqa: ARG001 — Unsloth's name
    """An adapter in a folder, for `fast_generate(…, lora_request=…)`; nothing is read yet."""
    from gazelle.generate.fast import LoraRequest

    return LoraRequest(Path(path).name, str(path))


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
    make_readable(*Path(save_directory).glob("*.safetensors"))


def _save_pretrained_gguf(
    self: "PreTrainedModel",
    save_directory: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    quantization_method: str | list[str] = "q8_0",
    save_method: str = "merged",
    calibration: Any = None,
) -> "list[Path]":
    """Write GGUF files for llama.cpp, Ollama and LM Studio, such as `model-Q4_K_M.gguf`; an adapter is merged first.

    Args:
        save_directory: made if need be; other files in it stay. Each file appears whole or not at all.
        tokenizer: written into the files. Left out: the one that the model was loaded with.
        quantization_method: "q4_k_m", "q8_0", "f16" or another one of llama.cpp's names, or a list of them.
        save_method: "merged", or "lora" for the adapter alone, as `adapter.gguf`, which llama.cpp puts on a GGUF file
            of the base.
        calibration: rows, in any form that training takes, on which the model is run to see which columns of each
            weight matter most; they are quantised with smaller errors then.

    Returns:
        The files.
    """
    from gazelle.export.gguf import export_gguf
    from gazelle.export.gguf_adapter import export_gguf_adapter

    if save_method not in ("merged", "lora"):
        raise OptionError("no such way to save a model as GGUF", where="save_method", found=save_method,
                          expected="merged or lora", fix=nearest(save_method, ("merged", "lora")))
    if tokenizer is None:
        tokenizer = loaded_tokenizer(self)
    if save_method == "lora":
        return [export_gguf_adapter(self, tokenizer, f"{save_directory}/adapter.gguf")]
    return export_gguf(self, tokenizer, save_directory, quantization_method, calibration=calibration)


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
    return save_checkpoint(self, tokenizer, save_directory, save_method, max_shard_size=max_shard_size, **options)


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


def _export_onnx(self: "PreTrainedModel", path: str, dtype: "torch.dtype | str | None" = None) -> "list[Path]":
    """Write an ONNX file with a cache of keys and values, for onnxruntime and TensorRT; an adapter is merged first.

    Args:
        path: a name that ends in .onnx; weights of 2 GB and more go into a file beside it.
        dtype: "float32" (the default) or "float16".

    Returns:
        The files.
    """
    from gazelle.export.onnx import export_onnx

    return export_onnx(self, path, dtype=dtype)


def _resize_token_embeddings(self: "PreTrainedModel", new_num_tokens: int, mean_resizing: bool = True) -> Any:  # noqa: ARG001
    """As in transformers; added rows start as the mean of all, are trained with the adapter and saved with it."""
    return resize_token_embeddings(self, new_num_tokens)
