"""The model families that can be written as GGUF: llama.cpp's names for their settings, and how it keeps their weights.

A new family is a row of `FAMILIES` and a case in tests/export/test_gguf_families.py, which compares its logits with
transformers'. The reverse direction is models/gguf_families.py. Facts: llama.cpp's src/models and conversion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.base.log import logger
from gazelle.export.gguf_rope import Fields, head_size, rope_fields
from gazelle.models.families import window_of

_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_fast", "gelu_new")}


def _none(_: Any) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        architecture: llama.cpp's name.
        extras: metadata beyond what all have.
        permuted: rows of q and k go pairwise, for ggml's other rotary kernel.
        norm_offset: added to the weights of norms.
        activation: of the MLP.
        scalings: rotary scalings that llama.cpp has for the architecture.
        window_period: every how many layers one has full attention and no sliding window, unless the file says
            otherwise; 0 where llama.cpp has no sliding windows.
        tied: llama.cpp takes the embedding as the head, whatever the file has.
        biases: names of linears that may have one.
        deep: layers of the variant whose queries llama.cpp scales by hidden / heads instead of the head's size.
    """

    architecture: str
    extras: Callable[[Any], Fields] = _none
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    scalings: tuple[str, ...] = ("linear", "yarn")
    window_period: int = 0
    tied: bool = False
    biases: tuple[str, ...] = ()
    deep: int = 0


def _softcaps(config: Any) -> Fields:
    # llama.cpp always caps Gemma 2's; so high a cap changes nothing.
    return {"attn_logit_softcapping": float(config.attn_logit_softcapping or 1e5),
            "final_logit_softcapping": float(config.final_logit_softcapping or 1e5)}


def _gemma3(config: Any) -> Fields:
    cap = config.final_logit_softcapping
    return {"final_logit_softcapping": float(cap)} if cap else {}


def _granite(config: Any) -> Fields:
    return {"attention.scale": float(config.attention_multiplier), "logit_scale": float(config.logits_scaling),
            "embedding_scale": float(config.embedding_multiplier), "residual_scale": float(config.residual_multiplier)}


def _phi3(config: Any) -> Fields:
    if config.hidden_size != config.num_attention_heads * head_size(config):
        raise _error("heads of this size", f"{config.num_attention_heads} heads of {head_size(config)}",
                     f"heads that make up the hidden size, {config.hidden_size}")
    return {"attention.sliding_window": int(config.sliding_window or 0),
            "rope.scaling.original_context_length": int(config.original_max_position_embeddings)}


def _smollm3(config: Any) -> Fields:
    usual = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != usual:
        raise _error("this choice of layers without rotary positions", str(config.no_rope_layers), "every fourth layer")
    return {}


_LLAMA_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = Family("llama", permuted=True, scalings=("linear", "yarn", "llama3"), biases=_LLAMA_BIASES)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", biases=_LLAMA_BIASES[:3]),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", _phi3, scalings=("longrope",)),
    "gemma": Family("gemma", norm_offset=1.0, activation="gelu", tied=True),
    "gemma2": Family("gemma2", _softcaps, norm_offset=1.0, activation="gelu", window_period=2, tied=True, deep=46),
    "gemma3_text": Family("gemma3", _gemma3, norm_offset=1.0, activation="gelu", scalings=("linear",),
                          window_period=6, deep=62),
    "smollm3": Family("smollm3", _smollm3, permuted=True),
    "granite": Family("granite", _granite, permuted=True, scalings=("linear", "yarn", "llama3"), biases=_LLAMA_BIASES),
}


def family_of(config: Any) -> Family:
    """The row of a decoder's config.

    Raises:
        ModelError: the family has no row, or the config asks for what llama.cpp does not have.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError("this kind of model cannot be written as GGUF", where="config.json, model_type",
                         found=config.model_type, expected="one of " + ", ".join(FAMILIES),
                         fix="export to safetensors: save_pretrained_merged")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in _ACTIVATIONS[family.activation]:
        raise _error("this activation", activation, " or ".join(_ACTIVATIONS[family.activation]))
    if getattr(config, "use_bidirectional_attention", False):
        raise _error("attention to later tokens", "use_bidirectional_attention", "causal attention")
    return family


def fields_of(config: Any, family: Family) -> tuple[Fields, dict[str, Tensor]]:
    """The metadata of a decoder, by whole keys, and tensors that stand for settings.

    Raises:
        ModelError: the config asks for what llama.cpp does not have.
    """
    rope, tensors = rope_fields(config, family.scalings)
    fields = {
        "vocab_size": config.vocab_size, "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    fields |= _window(config, family) | family.extras(config) | rope
    return {f"{family.architecture}.{key}": value for key, value in fields.items()}, tensors


def check_bias(name: str, family: Family) -> None:
    """Raise `ModelError` for a bias that llama.cpp does not know in this family."""
    module, _, kind = name.rpartition(".")
    if kind == "bias" and module.rpartition(".")[2] not in family.biases:
        raise _error("this bias", name, "biases of " + ", ".join(family.biases) if family.biases else "no biases")


def converted(name: str, weight: Tensor, family: Family, config: Any) -> Tensor:
    """A tensor of the Hugging Face checkpoint, in float32, as llama.cpp keeps it."""
    part = name.split(".")[-2]
    if family.permuted and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    if family.norm_offset and part.endswith("norm"):
        weight = weight + family.norm_offset
    if family.deep and part == ("q_norm" if family.architecture == "gemma3" else "q_proj"):
        return weight * _query_scale(config, family)
    return weight


def _query_scale(config: Any, family: Family) -> float:
    """What makes up for llama.cpp's scale of queries, which it takes from sizes: the file cannot state another."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads if config.num_hidden_layers == family.deep else head_size(config)
    return float((size / config.query_pre_attn_scalar) ** 0.5)


def _window(config: Any, family: Family) -> Fields:
    layers, limit = config.num_hidden_layers, config.max_position_embeddings
    windows = [window_of(config, i) for i in range(layers)]
    narrow = [window is not None and window < limit for window in windows]
    if family.window_period:
        if not any(windows):  # llama.cpp has a window of its own where the file states none
            return {"attention.sliding_window": limit}
        period = next((p for p in (family.window_period, *range(1, layers + 2))
                       if all((i % p < p - 1) == (windows[i] is not None) for i in range(layers))), None)
        if period is None:
            raise _error("this order of layers with sliding windows", str(config.layer_types),
                         "the same number before each layer of full attention")
        fields: Fields = {"attention.sliding_window": int(config.sliding_window)}
        return fields if period == family.window_period else fields | {"attention.sliding_window_pattern": period}
    if any(narrow):
        window = min(window for window in windows if window is not None)
        logger.warning("llama.cpp has no sliding windows for %s models: the file states a context of %d tokens, the "
                       "window, instead of %d, since answers are the model's own up to there.",
                       config.model_type, window, limit)
        return {"context_length": int(window)}
    return {}


def _error(what: str, found: Any, expected: str) -> ModelError:
    return ModelError(f"llama.cpp does not have {what} for this kind of model", where="config.json", found=found,
                      expected=expected, fix="export to safetensors: save_pretrained_merged")
