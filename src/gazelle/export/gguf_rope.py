"""How a model's rotary embedding is stated in a GGUF file: metadata, and tensors of divisors of its frequencies."""

import math
from typing import Any

import torch
from torch import Tensor

from gazelle.base.errors import ModelError

Fields = dict[str, Any]


def head_size(config: Any) -> int:
    """Of a decoder's attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_fields(config: Any, kinds: tuple[str, ...]) -> tuple[Fields, dict[str, Tensor]]:
    """Metadata without the architecture's name in front, and float32 tensors of one divisor a frequency.

    Args:
        config: of the decoder. Of Gemma 3, which rotates in two ways, the one of full attention counts.
        kinds: ways of scaling that llama.cpp has for the architecture.

    Raises:
        ModelError: frequencies are scaled in another way.
    """
    rope = dict(config.rope_parameters)
    fields: Fields = {}
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise _unknown(local, ("default",), "sliding_attention")
        fields["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *kinds):
        raise _unknown(rope, ("default", *kinds), "rope_parameters")
    head = head_size(config)
    partial = rope.get("partial_rotary_factor") or 1.0
    if partial != 1 and "longrope" not in kinds:
        raise ModelError("llama.cpp rotates whole heads of this kind of model", where="config.json, rope_parameters",
                         found=f"partial_rotary_factor {partial}", expected="1.0",
                         fix="export to safetensors: save_pretrained_merged")
    fields |= {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": int(head * partial)}
    tensors: dict[str, Tensor] = {}
    if kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        fields |= _yarn(config, rope)
    elif kind == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(config, head)
    elif kind == "longrope":
        more, tensors = _longrope(config, rope)
        fields |= more
    return fields, tensors


def _yarn(config: Any, rope: Fields) -> Fields:
    factor = float(rope["factor"])
    magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    stated = rope.get("attention_factor")
    if rope.get("truncate") is False or rope.get("mscale") or (stated and not math.isclose(stated, magnitude)):
        raise ModelError("llama.cpp has YaRN with its usual magnitude and rounding alone",
                         where="config.json, rope_parameters", found=str(rope),
                         expected=f"attention_factor {magnitude:.4f}, no mscale, truncate",
                         fix="export to safetensors: save_pretrained_merged")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return {"rope.scaling.type": "yarn", "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1)}


def _llama3_divisors(config: Any, head: int) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
    return plain / scaled


def _longrope(config: Any, rope: Fields) -> tuple[Fields, dict[str, Tensor]]:
    original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    stretch = rope.get("factor") or config.max_position_embeddings / original
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    fields = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": original,
              "rope.scaling.attn_factor": float(magnitude)}
    return fields, {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
                    for name in ("long", "short")}


def _unknown(rope: Fields, kinds: tuple[str, ...], where: str) -> ModelError:
    return ModelError("llama.cpp cannot scale the rotary frequencies of this kind of model in this way",
                      where=f"config.json, {where}", found=f"rope_type {rope.get('rope_type')}",
                      expected=" or ".join(kinds), fix="export to safetensors: save_pretrained_merged")
