"""Packed rows in any Hugging Face decoder whose attention can be swapped through transformers' attention interface."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_NAME = "gazelle_packed"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def supports_packing(model: "nn.Module") -> str | None:
    """Why rows cannot be packed for this model, or None if they can."""
    inner = _unwrap(model)
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if config.is_encoder_decoder or not getattr(config, "is_causal", True) \
            or getattr(config, "use_bidirectional_attention", False):
        return "it is not a causal decoder"
    if inner._is_stateful or kinds & {"linear_attention", "mamba", "conv"}:
        return "it has state-space or recurrent layers, which would carry one row into the next"
    if kinds:
        return f"it has layers of a kind not known here: {', '.join(sorted(kinds))}"
    if any(name.endswith(".sinks") for name, _ in inner.named_parameters()):
        return "its attention has sinks"
    if not inner._supports_attention_backend or getattr(config, "alibi", False):
        return "its attention cannot be swapped through transformers' attention interface"
    return None


@contextlib.contextmanager
def packed_attention_on(model: "nn.Module") -> Iterator[None]:
    """While it lasts, `model` takes packed rows, and only those; afterwards it is as it was.

    A forward pass then needs `input_ids` [1, T], `position_ids` [1, T] that begin at 0 in each row, `cu_seq_lens_q`
    (int32 [R + 1], where each row begins, and T) and `max_length_q` (int, the longest row), and no attention mask.

    Raises:
        OptionError: `supports_packing` says no.
        RuntimeError: in a forward pass without `cu_seq_lens_q`, or with an attention mask.
    """
    if reason := supports_packing(model):
        raise OptionError(f"rows cannot be packed for this model: {reason}", where="packing", found="packing=True",
                          expected="a decoder with ordinary attention", fix="set packing=False")
    _register()
    inner = _unwrap(model)
    # set_attn_implementation also rewrites the configs of parts, so each is put back by itself.
    configs = {id(config): config for config in _configs(inner)}
    earlier = {key: config._attn_implementation_internal for key, config in configs.items()}
    hook = inner.register_forward_pre_hook(_check_arguments, with_kwargs=True)
    try:
        inner.set_attn_implementation(_NAME)
        yield
    finally:
        hook.remove()
        for key, config in configs.items():
            config._attn_implementation_internal = earlier[key]


def _unwrap(model: "nn.Module") -> "PreTrainedModel":
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _configs(model: "PreTrainedModel") -> Iterator[Any]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module.config
            yield from (part for name in module.config.sub_configs if (part := getattr(module.config, name, None)))


def _register() -> None:
    # No mask function is registered beside it: transformers then makes no mask at all, which is what is wanted.
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(_NAME, _attend)


def _check_arguments(_module: "nn.Module", _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None:
        raise RuntimeError("packed rows have no padding: leave attention_mask out while packed attention is on")


def _attend(_module: "nn.Module", query: "Tensor", key: "Tensor", value: "Tensor", attention_mask: "Tensor | None",
            scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
            softcap: float | None = None, cu_seq_lens_q: "Tensor | None" = None, max_length_q: int | None = None,
            **_: Any) -> "tuple[Tensor, None]":
    """transformers' attention function: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    from gazelle.kernels.attention import packed_attention

    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError("packed attention is on, but the batch has no cu_seq_lens_q and max_length_q: "
                           "collate packed rows, or leave `packed_attention_on`")
    if attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError("packed rows come as one sequence of [1, T] tokens without an attention mask, "
                           f"not as {query.shape[0]} sequences")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None
