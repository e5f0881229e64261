"""Packed rows in any Hugging Face decoder whose attention can be swapped through transformers' attention interface."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.models.families import window_of
from gazelle.models.modes import evaluating
from gazelle.models.swap import runs_on_engine
from gazelle.quantize.bnb import forbid_repacking

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_NAME = "gazelle_packed"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_tried: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()


class _NotPackedError(RuntimeError):
    """Attention did not get what packed rows need; `reason` says so of the model, the message of the call."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def supports_packing(model: "nn.Module") -> str | None:
    """Why rows cannot be packed for this model, or None if they can.

    What the config does not tell is tried, once for each model: a forward pass with two rows of two tokens.
    """
    inner = unwrap(model)
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
    if runs_on_engine(inner):
        return None
    if inner not in _tried:
        _tried[inner] = _try(inner)
    return _tried[inner]


def _try(inner: "PreTrainedModel") -> str | None:
    """Why two packed rows do not reach the model's attention as they should, or None if they do."""
    import torch

    device = inner.get_input_embeddings().weight.device
    if device.type == "meta":
        return None
    forbid_repacking(inner)  # bitsandbytes does that at the first evaluation, which this one may be
    seen: list[tuple[int | None, int | None]] = []
    begins = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    try:
        with torch.no_grad(), evaluating(inner), _swapped(inner):
            inner(input_ids=torch.tensor([[1, 2, 2, 1]], device=device), use_cache=False,
                  position_ids=torch.tensor([[0, 1, 0, 1]], device=device), cu_seq_lens_q=begins,
                  cu_seq_lens_k=begins, max_length_q=2, max_length_k=2, gazelle_seen=seen)
    except _NotPackedError as error:
        return error.reason
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"two rows of two tokens were tried, and failed: {error}"
    if not seen:
        return "its attention does not go through transformers' attention interface"
    config = inner.config.get_text_config()
    if any(window != window_of(config, layer) for layer, window in seen):
        return "its attention is not told of its sliding window"
    return None


@contextlib.contextmanager
def packed_attention_on(model: "nn.Module") -> Iterator[None]:
    """While it lasts, `model` takes packed rows; afterwards it is as it was.

    A packed forward pass has `input_ids` [1, T], `position_ids` [1, T] that begin at 0 in each row, `cu_seq_lens_q`
    (int32 [R + 1], where each row begins, and T) and `max_length_q` (int, the longest row), and no attention mask.
    One without `cu_seq_lens_q`, such as those of `generate`, runs with the attention that the model had before.

    Raises:
        OptionError: `supports_packing` says no.
        RuntimeError: in a forward pass with both `cu_seq_lens_q` and an attention mask.
    """
    if reason := supports_packing(model):
        raise OptionError(f"rows cannot be packed for this model: {reason}", where="packing", found="packing=True",
                          expected="a decoder with ordinary attention", fix="set packing=False")
    with _swapped(unwrap(model)):
        yield


@contextlib.contextmanager
def _swapped(inner: "PreTrainedModel") -> Iterator[None]:
    _register()
    attention = Attention(inner, _NAME)

    def before(_module: "nn.Module", _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("cu_seq_lens_q") is None:
            attention.put_back()
        elif kwargs.get("attention_mask") is not None:
            raise RuntimeError("packed rows have no padding: leave attention_mask out while packed attention is on")

    # Between calls the packed one is on: checkpointed layers run once more in the backward pass.
    hooks = [inner.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        attention.put()
        hooks.append(inner.register_forward_hook(lambda *_: attention.put(), always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        attention.put_back()


class Attention:
    """An attention function, known to transformers by `name`, that a model can be put on and taken off again."""

    def __init__(self, inner: "PreTrainedModel", name: str) -> None:
        # set_attn_implementation also rewrites the configs of parts, so each is put back by itself.
        self._configs = {id(config): config for config in _configs(inner)}
        self._earlier = self._now()
        try:
            inner.set_attn_implementation(name)
            self._ours = self._now()
        finally:
            self.put_back()

    def put(self) -> None:
        """From now on the model attends by this function."""
        self._set(self._ours)

    def put_back(self) -> None:
        """From now on it attends as it did before."""
        self._set(self._earlier)

    def _now(self) -> dict[int, Any]:
        return {key: config._attn_implementation_internal for key, config in self._configs.items()}

    def _set(self, implementations: dict[int, Any]) -> None:
        for key, config in self._configs.items():
            config._attn_implementation_internal = implementations[key]


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


def _attend(module: "nn.Module", query: "Tensor", key: "Tensor", value: "Tensor", attention_mask: "Tensor | None",
            scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
            softcap: float | None = None, cu_seq_lens_q: "Tensor | None" = None, max_length_q: int | None = None,
            gazelle_seen: list[Any] | None = None, **_: Any) -> "tuple[Tensor, None]":
    """transformers' attention function: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    from gazelle.kernels.attention import packed_attention

    if cu_seq_lens_q is None or max_length_q is None:
        raise _NotPackedError("packed attention is on, but no cu_seq_lens_q and max_length_q came with the batch: "
                              "collate packed rows, or leave `packed_attention_on`",
                              "its forward pass does not tell its attention where rows begin")
    if attention_mask is not None or query.shape[0] != 1:
        raise _NotPackedError("packed rows come as one sequence of [1, T] tokens without an attention mask, "
                              f"not as {query.shape[0]} sequences", "its attention makes a mask of its own")
    if gazelle_seen is not None:
        gazelle_seen.append((getattr(module, "layer_idx", None), sliding_window))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None
