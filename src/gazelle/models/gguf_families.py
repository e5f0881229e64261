"""What each model family of llama.cpp calls its settings, and how its weights differ from the Hugging Face layout.

A new family is one row here and one row in tests/models/test_gguf.py. The values undone here were put in by
llama.cpp's `convert_hf_to_gguf.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gazelle.base.errors import ModelError
from gazelle.models.gguf_file import GgufFile, Strings

Config = dict[str, Any]
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Family:
    """One row: the Hugging Face model type, what its config adds, and how its weights are stored.

    Args:
        model_type: `AutoConfig`'s name.
        extras: config values beyond the common ones.
        permuted: q and k rows are interleaved for ggml's rotary kernel.
        norms_plus_one: norm weights are stored as 1 + w.
    """

    model_type: str
    extras: Callable[[GgufFile], Config] = lambda _: {}
    permuted: bool = False
    norms_plus_one: bool = False


def base_config(file: GgufFile) -> Config:
    """The config values that all families share."""
    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{file.architecture}.{key}", default)
        if value is None:
            raise ModelError("a setting is missing from the GGUF file", where=str(file.path),
                             found=f"no {file.architecture}.{key}", expected="a number", fix="export the file again")
        return value

    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if get("block_count") != len(blocks):  # also keeps a damaged count from building a million layers
        raise ModelError("the GGUF file does not have the layers it claims", where=str(file.path),
                         found=f"tensors of {len(blocks)} layers", expected=f"block_count, {get('block_count')}",
                         fix="download or export the file again")
    heads = get("attention.head_count")
    hidden = get("embedding_length")
    config = {
        "hidden_size": hidden, "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads), "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"), "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "head_dim": get("attention.key_length", hidden // heads), "vocab_size": vocabulary_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors, "rope_parameters": _rope(file, get),
    }
    if any(isinstance(value, np.ndarray | Strings) for value in config.values()) or get("expert_count", 0):
        raise ModelError("this GGUF file has layers that differ from each other, or experts", where=str(file.path),
                         found=f"{file.architecture} with per-layer sizes or experts", expected="a dense decoder",
                         fix="use the model's safetensors checkpoint")
    return config


def vocabulary_size(file: GgufFile) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError("the GGUF file has no token embedding", where=str(file.path), found="no token_embd.weight",
                         expected="a language model", fix="check that this is the model and not an adapter or mmproj")
    return file.tensors["token_embd.weight"].shape[0]


def unpermute(weight: Array, heads: int) -> Array:
    """Rows of q or k from ggml's interleaved rotary order to Hugging Face's halves, for a weight or a bias."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _rope(file: GgufFile, get: Callable[..., Any]) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    kind = get("rope.scaling.type", "none")
    known = {"phi3": ("none", "longrope"), "gemma3": ("none", "linear")}.get(file.architecture,
                                                                             ("none", "linear", "yarn"))
    if kind not in known:
        raise ModelError("the GGUF file scales its rotary frequencies in an unknown way", where=str(file.path),
                         found=f"rope.scaling.type {kind}", expected=", ".join(known),
                         fix="use the model's safetensors checkpoint")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": get("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3_rope(file, rope["rope_theta"])
    return rope


def _llama3_rope(file: GgufFile, theta: float) -> Config:
    """Llama 3.1's scaling, of which the file keeps only the outcome: one divisor for each frequency."""
    divisors = file.read("rope_freqs.weight")
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
        raise ModelError("the GGUF file scales its rotary frequencies in an unknown way", where=str(file.path),
                         found="rope_freqs.weight unlike Llama 3's", expected=f"Llama 3's rule with factor {factor:g}",
                         fix="use the model's safetensors checkpoint")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original}


def _llama(file: GgufFile) -> Config:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors}


def _phi3(file: GgufFile) -> Config:
    get = file.metadata.get
    hidden, heads = get("phi3.embedding_length", 0), get("phi3.attention.head_count", 1)
    rope: Config = {"rope_type": "default", "rope_theta": get("phi3.rope.freq_base", 10000.0),
                    "partial_rotary_factor": get("phi3.rope.dimension_count", hidden // heads) / (hidden // heads)}
    original = get("phi3.rope.scaling.original_context_length", get("phi3.context_length"))
    if "rope_factors_long.weight" in file.tensors:
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original,
                 "long_factor": file.read("rope_factors_long.weight").tolist(),
                 "short_factor": file.read("rope_factors_short.weight").tolist()}
    return {"rope_parameters": rope, "sliding_window": get("phi3.attention.sliding_window") or None,
            "original_max_position_embeddings": original}


def _gemma2(file: GgufFile) -> Config:
    get = file.metadata.get
    heads, layers = get("gemma2.attention.head_count", 1), get("gemma2.block_count")
    # The file does not say by what queries are scaled; llama.cpp tells the 27B by its depth, and so do we.
    scalar = get("gemma2.embedding_length", 0) // heads if layers == 46 else get("gemma2.attention.key_length", 256)
    return {"query_pre_attn_scalar": scalar, "sliding_window": get("gemma2.attention.sliding_window", 4096),
            "attn_logit_softcapping": get("gemma2.attn_logit_softcapping", 50.0),
            "final_logit_softcapping": get("gemma2.final_logit_softcapping", 30.0)}


def _gemma3(file: GgufFile) -> Config:
    get = file.metadata.get
    heads, layers = get("gemma3.attention.head_count", 1), get("gemma3.block_count", 0)
    scalar = get("gemma3.embedding_length", 0) // heads if layers == 62 else get("gemma3.attention.key_length", 256)
    full: Config = {"rope_type": "default", "rope_theta": get("gemma3.rope.freq_base", 1e6)}
    if get("gemma3.rope.scaling.type") == "linear":
        full |= {"rope_type": "linear", "factor": get("gemma3.rope.scaling.factor")}
    return {"query_pre_attn_scalar": scalar, "sliding_window": get("gemma3.attention.sliding_window", 512),
            "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
            "rope_parameters": {"full_attention": full, "sliding_attention": {
                "rope_type": "default", "rope_theta": get("gemma3.rope.local.freq_base", 10000.0)}}}


def _granite(file: GgufFile) -> Config:
    names = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
             "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
    found = {name: file.metadata.get(f"granite.{key}") for name, key in names.items()}
    return _llama(file) | {name: value for name, value in found.items() if value is not None}


FAMILIES = {
    "llama": Family("llama", _llama, permuted=True),  # Mistral files say "llama" too, and the arithmetic is the same
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", _phi3),
    "gemma": Family("gemma", norms_plus_one=True),
    "gemma2": Family("gemma2", _gemma2, norms_plus_one=True),
    "gemma3": Family("gemma3_text", _gemma3, norms_plus_one=True),
    "smollm3": Family("smollm3", permuted=True),
    "granite": Family("granite", _granite, permuted=True),
}
