"""The model families that the engine runs: how each one's Hugging Face layer maps to a `DecoderSpec`.

A new family is a row of `FAMILIES`, and a case in tests/models/families.py, if its layer is the flow of
`engine.spec` under Hugging Face's usual names.
"""

from dataclasses import dataclass
from typing import Any

from gazelle.engine.spec import DecoderSpec

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What a family does otherwise than Llama.

    Attributes:
        qkv, gate_up: attributes of the attention and of the MLP that hold these projections, one or several.
        norm_offset: added to norm weights.
        post_norms: a layer has four norms, two of them behind attention and MLP.
        qk_norm: queries and keys are normalised.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False

    def norm_names(self) -> dict[str, str]:
        """Where the norms of `engine.layer.Norms` are found in a layer."""
        names = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
        if self.post_norms:
            names = {"attention": "input_layernorm", "after_attention": "post_attention_layernorm",
                     "mlp": "pre_feedforward_layernorm", "after_mlp": "post_feedforward_layernorm"}
        if self.qk_norm:
            names |= {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
        return names


LLAMA = Family()
FAMILIES = {
    "llama": LLAMA,  # also SmolLM2, TinyLlama, Yi, DeepSeek's dense distillates
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": Family(qk_norm=True),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),  # also Phi-3.5, Phi-4 and Phi-4-mini
    "gemma": Family(norm_offset=1.0),
    "gemma2": Family(norm_offset=1.0, post_norms=True),
    "gemma3_text": Family(norm_offset=1.0, post_norms=True, qk_norm=True),
    "smollm3": LLAMA,
    "granite": LLAMA,
}


class UnsupportedError(Exception):
    """Why a layer cannot run on the engine."""


def spec_of(layer: Any, config: Any, number: int) -> DecoderSpec:
    """The spec of a Hugging Face decoder layer.

    Args:
        layer: the module.
        config: of the decoder itself (`get_text_config()`).
        number: of the layer, from 0.

    Raises:
        UnsupportedError: the config asks for something that the engine does not have.
    """
    family = FAMILIES[config.model_type]
    attention = layer.self_attn
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"activation {activation}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError("bidirectional attention")
    if getattr(config, "resid_pdrop", 0):
        raise UnsupportedError("dropout on the residual stream (resid_pdrop)")
    heads = config.num_attention_heads
    return DecoderSpec(
        hidden=config.hidden_size, intermediate=config.intermediate_size, heads=heads,
        kv_heads=config.num_key_value_heads, head_dim=getattr(attention, "head_dim", config.hidden_size // heads),
        eps=config.rms_norm_eps, attention_scale=attention.scaling, norm_offset=family.norm_offset,
        activation=_ACTIVATIONS[activation], qk_norm=family.qk_norm, post_norms=family.post_norms,
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        rotary=bool(getattr(attention, "use_rope", True)), window=window_of(config, number),
        softcap=getattr(config, "attn_logit_softcapping", None),
        attention_dropout=getattr(config, "attention_dropout", 0.0),
    )


def window_of(config: Any, number: int | None) -> int | None:
    """The sliding window that a config gives to a layer."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and number is not None:
        return window if kinds[number] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None
