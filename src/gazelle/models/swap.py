"""Runs the decoder layers of a Hugging Face model object on the engine, and undoes it.

A swapped layer is the same module object with the same parameters under the same names; only its class is replaced,
by a subclass made here whose forward pass is the engine's. Passes with a cache, as in `generate`, run the original.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError
from gazelle.base.log import logger, say_once
from gazelle.engine.fp8 import check_fp8
from gazelle.engine.keep import ALL, KEEP, Keep
from gazelle.engine.layer import Layer, Norms, Shared
from gazelle.engine.linear import Projection
from gazelle.engine.linear_cpu import make_projection
from gazelle.engine.passes import run_layer
from gazelle.engine.scratch import Scratch
from gazelle.models.families import FAMILIES, UnsupportedError, spec_of
from gazelle.models.final_norm import FusedNorm
from gazelle.models.head import FusedHead, head_refusal, logits_of
from gazelle.models.linears import hooked, read_linear, state_of
from gazelle.models.rows import rows_of


@dataclass(frozen=True)
class Explained:
    """What became of a part of a model. `reason` is empty for a part that runs on the engine."""

    name: str
    kind: str
    reason: str = ""


class Engine:
    """What the swapped layers of one model share."""

    def __init__(self, precision: str) -> None:
        self.scratch = Scratch()
        self.shared = Shared()
        self.precision = precision
        self.read = 0  # times that a layer was read: its weights are elsewhere since then

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        copied = memo[id(self)] = Engine(self.precision)
        return copied


class Swapped:
    """What a swapped layer carries: how to read its modules, and the engine's layer once it has been read."""

    def __init__(self, number: int, engine: Engine, keep: Keep | None = None) -> None:
        self.number, self.engine = number, engine
        self.keep = keep  # what a plan says; without one, gradient checkpointing decides
        self.state: Any = None
        self.held: Any = None  # of the state, what is the same in training and in evaluation
        self.layer: Layer | None = None
        # Its weights lie in host memory; they are on the device while this lasts (models.streamed).
        self.home: Callable[[], AbstractContextManager[None]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swapped":
        return Swapped(self.number, memo.get(id(self.engine)) or self.engine.__deepcopy__(memo), self.keep)


class _FusedLayer(nn.Module):
    """The part of a swapped layer's class that replaces the original's."""

    gazelle: Swapped
    gazelle_config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Checkpointing is the engine's own business: it recomputes without running the layer's module twice.
        if self.gradient_checkpointing and self.training and kwargs.get("past_key_values") is None:
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reason := _not_here(hidden_states, args, kwargs):
            if reason != _CACHE:
                say_once(f"a forward pass runs as Hugging Face wrote it: {reason}")
            with (self.gazelle.home or contextlib.nullcontext)():
                return super().forward(hidden_states, *args, **kwargs)
        try:
            layer = engine_layer(self)
        except UnsupportedError as error:
            say_once(f"a layer runs as Hugging Face wrote it: {error}")
            with (self.gazelle.home or contextlib.nullcontext)():
                return super().forward(hidden_states, *args, **kwargs)
        layer.keep = self.gazelle.keep or (ALL if self.gradient_checkpointing else KEEP)
        batch, length, width = hidden_states.shape
        rows = rows_of(batch, length, kwargs, by_position="flash" in (self.gazelle_config._attn_implementation or ""))
        cos = sin = None
        if layer.spec.rotary:
            rotation = kwargs["position_embeddings"]
            cos, sin = (part.expand(batch, length, -1).reshape(batch * length, -1) for part in rotation)
        y = run_layer(layer, hidden_states.reshape(-1, width), rows, cos, sin, self.training)
        return y.view(batch, length, width)


_SWAPPED = (_FusedLayer, FusedNorm, FusedHead)
_CACHE = "it has a cache"
_classes: dict[tuple[type, type], type] = {}


def _subclass(front: Any, original: Any) -> type:
    """`original` with `front` before it. One for each, so that copies of a model share their classes."""
    if (front, original) not in _classes:

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Trainer and generate look at the signature to learn what a model takes.
            return front.forward(self, *args, **kwargs)

        namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__, "forward": forward}
        _classes[front, original] = type(original.__name__, (front, original), namespace)
    return _classes[front, original]


def _not_here(hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call cannot run on the engine, or None."""
    if kwargs.get("past_key_values") is not None:
        return _CACHE
    mask = kwargs.get("attention_mask")
    if args or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
        return "its attention mask is of a kind that the engine does not know"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if torch.is_autocast_enabled(hidden_states.device.type) \
            and torch.get_autocast_dtype(hidden_states.device.type) != hidden_states.dtype:
        return f"weights are {hidden_states.dtype} and autocast computes in another type"
    return None


def engine_layer(module: Any) -> Layer:
    """The engine's layer for a module, read anew if its modules are not what they were."""
    swapped: Swapped = module.gazelle
    parts = _parts(module)
    state = _state(module, parts)
    if swapped.layer is None or state != swapped.state:
        # From training to evaluation and back weights stay where they are: recorded steps go on reading them there.
        stays = swapped.home is not None or swapped.held == _state(module, parts, mode=False)
        if swapped.layer is not None and stays:
            swapped.layer = _adapted_anew(module, parts, swapped.layer)
        else:
            swapped.layer = _read(module, parts, swapped)
        # Reading lays weights side by side, which moves them.
        swapped.state, swapped.held = _state(module, parts), _state(module, parts, mode=False)
    return swapped.layer


def _state(module: Any, parts: list[list[Any]], *, mode: bool = True) -> tuple[Any, ...]:
    """What decides how a module is read: if it differs, the module has to be read again. `mode` as in `state_of`."""
    norms = [(norm.weight, hooked(norm)) for norm in _norms(module).values()]
    return (mode and module.training, _sees_gradients(module), hooked(module.self_attn), hooked(module.mlp),
            tuple(state_of(part, mode=mode) for group in parts for part in group),
            tuple((id(weight), weight.requires_grad, has_hooks) for weight, has_hooks in norms))


def _parts(module: Any) -> list[list[Any]]:
    """The linear modules of each projection."""
    family = FAMILIES[module.gazelle_config.model_type]
    return [[getattr(module.self_attn, name) for name in family.qkv], [module.self_attn.o_proj],
            [getattr(module.mlp, name) for name in family.gate_up], [module.mlp.down_proj]]


def _norms(module: Any) -> dict[str, Any]:
    """The norm modules by their names in `Norms`."""
    names = FAMILIES[module.gazelle_config.model_type].norm_names()
    return {name: module.get_submodule(path) for name, path in names.items()}


def _sees_gradients(module: Any) -> bool:
    """True if a layer has backward hooks: the engine changes the gradient of the stream under them, in place."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _refuse_hooks(module: Any) -> None:
    if _sees_gradients(module):
        raise UnsupportedError("backward hooks on the layer")
    if any(hooked(part) for part in (module.self_attn, module.mlp, *_norms(module).values())):
        raise UnsupportedError("hooks on its parts")


def linear_modules(module: Any) -> list[Any]:
    """The linear layers of a decoder layer, in the order of the engine's projections and their parts."""
    return [part for group in _parts(module) for part in group]


def _read(module: Any, parts: list[list[Any]], swapped: Swapped) -> Layer:
    _refuse_hooks(module)
    spec = spec_of(module, module.gazelle_config, swapped.number)
    norms = {name: norm.weight for name, norm in _norms(module).items()}
    dtype = norms["attention"].dtype
    linears = [[read_linear(part) for part in group] for group in parts]
    places = {linear.weight.device for group in linears for linear in group}
    if len(places) > 1:
        raise UnsupportedError(f"its weights are on several devices ({', '.join(map(str, sorted(places, key=str)))})")
    engine = swapped.engine
    engine.read += 1
    qkv, o, gate_up, down = (make_projection(group, engine.scratch, slot, dtype, engine.precision)
                             for slot, group in enumerate(linears))
    return Layer(spec, Norms(**norms), qkv, o, gate_up, down, engine.shared)


def _adapted_anew(module: Any, parts: list[list[Any]], layer: Any) -> Layer:
    """A layer whose weights stay where they are, or are not here, with its adapters as they are now."""
    _refuse_hooks(module)
    projections: list[Projection] = []
    for projection, group in zip(layer.projections, parts, strict=True):
        adapters = [read_linear(part).adapter for part in group]
        ranks = [0 if adapter is None else adapter.a.shape[0] for adapter in adapters]
        if ranks != [columns.stop - columns.start for _, columns in projection.spans]:
            raise UnsupportedError("adapters were switched off or exchanged while its weights stream from host memory")
        copied = copy.copy(projection)
        copied.parts = tuple(replace(part, adapter=adapter)
                             for part, adapter in zip(projection.parts, adapters, strict=True))
        copied.has_dropout = any(adapter is not None and adapter.dropout > 0 for adapter in adapters)
        projections.append(copied)
    qkv, o, gate_up, down = projections
    return replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down)


def accelerate(model: Any, precision: str = "auto") -> Any:
    """Run the decoder layers of a model on gazelle's engine; returns the same model.

    Works on any Hugging Face causal model, with or without PEFT adapters and bitsandbytes weights, trained by any
    loop. Layers that the engine does not support stay as they are; `explain(model)` says which and why, and
    `restore(model)` undoes all of it. Calling it again after the model was changed is allowed.

    Args:
        model: a causal model.
        precision: "auto" computes in the model's own type; "fp8" multiplies frozen weights in 8 bits.

    Raises:
        OptionError: no such precision, or fp8 on a device that has none.
        ModelError: not a Hugging Face model.
    """
    inner = _hugging_face(model, "accelerate")
    if precision not in ("auto", "fp8"):
        raise OptionError("no such precision of the engine", where="accelerate(precision=…)", found=repr(precision),
                          expected="auto or fp8", fix='leave it out: "auto" computes in the model\'s own type')
    if precision == "fp8":
        check_fp8(inner.device)
    config = inner.config.get_text_config()
    decoder = _decoder(inner)
    _swap_head(inner, known=config.model_type in FAMILIES and decoder is not None)
    if config.model_type not in FAMILIES or decoder is None:
        say_once(f"the engine does not know {config.model_type}: its layers run as Hugging Face wrote them")
        return model
    engine = next((layer.gazelle.engine for layer in decoder.layers if isinstance(layer, _FusedLayer)), None)
    if engine is None or engine.precision != precision:
        engine = Engine(precision)
    refused: dict[str, int] = {}
    for number, layer in enumerate(decoder.layers):
        if isinstance(layer, _FusedLayer):
            if layer.gazelle.engine is not engine:
                layer.gazelle = Swapped(number, engine, layer.gazelle.keep)
            continue
        layer.gazelle_config = config
        try:
            _check(layer, config, number)
        except UnsupportedError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
            layer.gazelle_refused = str(error)
            continue
        layer.gazelle = Swapped(number, engine)
        layer.__class__ = _subclass(_FusedLayer, type(layer))
    if not isinstance(decoder.norm, FusedNorm) and not refused:
        decoder.norm.gazelle_offset = FAMILIES[config.model_type].norm_offset
        decoder.norm.__class__ = _subclass(FusedNorm, type(decoder.norm))
    if isinstance(decoder.norm, FusedNorm):
        decoder.norm.gazelle_engine = engine
    for reason, count in refused.items():
        logger.info("%d of %d layers run as Hugging Face wrote them: %s.", count, len(decoder.layers), reason)
    return model


def _hugging_face(model: Any, asked: str) -> Any:
    """The Hugging Face model that was handed in, without its adapter."""
    inner = unwrap(model)
    if isinstance(inner, nn.Module) and hasattr(inner, "config"):
        return inner
    raise ModelError("this is no Hugging Face model", where=f"{asked}(model)", found=repr(model)[:80],
                     expected="a causal model of transformers, with or without a PEFT adapter",
                     fix="load it first: model, tokenizer = FastLanguageModel.from_pretrained(name)")


def _swap_head(inner: Any, *, known: bool) -> None:
    if isinstance(inner, FusedHead):
        return
    reason = head_refusal(inner)
    if known or not reason:
        try:
            inner.gazelle_logits = logits_of(inner)
        except UnsupportedError as error:
            reason = str(error)
    if reason:
        say_once(f"the head is not fused with the loss: {reason}")
        if not known:  # else the class is wanted all the same: it keeps caches out of training
            inner.gazelle_refused = reason
            return
    inner.__class__ = _subclass(FusedHead, type(inner))


def _check(layer: Any, config: Any, number: int) -> None:
    """Raise `UnsupportedError` if the engine cannot run a layer."""
    spec_of(layer, config, number)
    _refuse_hooks(layer)
    for group in _parts(layer):
        for part in group:
            read_linear(part)


def restore(model: Any) -> Any:
    """Undo `accelerate`: every module has the class it had; returns the same model."""
    for module in _hugging_face(model, "restore").modules():
        if isinstance(module, _SWAPPED):
            module.__class__ = type(module).__mro__[2]
        for name in ("gazelle", "gazelle_config", "gazelle_refused", "gazelle_offset", "gazelle_engine",
                     "gazelle_logits"):
            module.__dict__.pop(name, None)
    for parameter in unwrap(model).parameters():
        if not parameter.data.is_contiguous():
            parameter.data = parameter.data.contiguous()
    return model


def explain(model: Any) -> list[Explained]:
    """What runs on the engine and what does not, part by part, and why not."""
    inner = _hugging_face(model, "explain")
    names = {id(module): name for name, module in inner.named_modules()}
    config = inner.config.get_text_config()
    decoder = _decoder(inner)
    known = decoder is not None and config.model_type in FAMILIES
    general = "the model is not accelerated" if known else f"the engine does not know {config.model_type}"
    modules = [*decoder.layers, decoder.norm] if decoder is not None else [inner.base_model]
    parts = []
    for module in (*(module for module in modules if module is not inner), inner):
        reason = _refusal(module) if isinstance(module, _SWAPPED) else getattr(module, "gazelle_refused", general)
        parts.append(Explained(names[id(module)] or "lm_head and loss", type(module).__name__, reason))
    return parts


def _refusal(module: Any) -> str:
    """Why a swapped module runs as Hugging Face wrote it after all, or nothing: it may have been changed since."""
    if isinstance(module, FusedHead):
        return head_refusal(module)
    if isinstance(module, _FusedLayer):
        try:
            _check(module, module.gazelle_config, module.gazelle.number)
        except UnsupportedError as error:
            return str(error)
    return ""


def add_gradients_in_place(model: Any, on: bool) -> None:
    """Whether the engine adds adapters' gradients to `.grad` itself, past autograd and its hooks.

    For a loop that keeps these buffers where they are, and clears them itself.
    """
    for module in swapped_layers(model):
        module.gazelle.engine.shared.in_place = on


def swapped_layers(model: Any) -> list[Any]:
    """The layers of a model that run on the engine."""
    return [module for module in unwrap(model).modules() if isinstance(module, _FusedLayer)]


def runs_on_engine(model: Any) -> bool:
    """True if every layer of the model runs on the engine."""
    decoder = _decoder(unwrap(model))
    return decoder is not None and all(isinstance(layer, _FusedLayer) for layer in decoder.layers)


def _decoder(inner: Any) -> Any:
    """The part of a causal model that holds its layers."""
    decoder = getattr(inner, "model", None)
    return decoder if hasattr(decoder, "layers") and hasattr(decoder, "norm") else None
