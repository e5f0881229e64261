"""Several LoRA adapters on one model at a time, each for the tokens that ask for it.

The factors of all adapters lie side by side in each layer, so that a step takes two products a layer however many
adapters are in it; in between, what a token has of other adapters is multiplied by zero.

Shape legend: T tokens, K inputs, N outputs, C columns of the adapters in a step.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.factors import Factors, is_adapted, lora_factors
from gazelle.adapters.load import put_adapter
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError
from gazelle.base.log import say_once

BASE = "__base__"  # PEFT's word for no adapter
_ACTIVE = ""  # the adapters that are active on the model, under no name
_READING = "gazelle_reading"


class MixedAdapters:
    """Puts adapters on a model's layers until `close`; outside of `applied` the model computes as it did before.

    Args:
        model: with or without adapters of PEFT's; what is active there serves tokens that ask for none by name.
        adapters: folders with adapters, by the names that tokens ask for them.

    Attributes:
        names: what tokens may ask for, besides nothing (what is active) and `BASE` (no adapter).

    Raises:
        ModelError: an adapter is more than low-rank factors, holds a NaN, or was made for another model.
        OptionError: two adapters of one name.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | PathLike[str]] | None = None) -> None:
        self._spans: dict[str, slice] = {}
        self._mask: Tensor | None = None  # [T, C]
        self._kept: Tensor | None = None  # the same for the tokens that the head is for
        self._span: slice | None = None
        self._on = False
        self._undo: list[tuple[Any, Any]] = []
        inner = unwrap(model)
        own, self.by_peft = _own(model)
        if self.by_peft and adapters:
            raise ModelError("other adapters cannot be used beside the one on this model", where="adapters",
                             found=f"{self.by_peft}", expected="a model without an adapter, or with plain LoRA",
                             fix="load the base model and name every adapter")
        for name in adapters or {}:
            if name in own or name in (_ACTIVE, BASE):
                raise OptionError("this name of an adapter is taken", where="adapters", found=repr(name),
                                  expected=f"another name than {', '.join(sorted({*own, BASE} - {_ACTIVE}))}",
                                  fix="rename it")
        read = own | {name: _read(model, Path(folder)) for name, folder in (adapters or {}).items()}
        self.names = tuple(name for name in read if name != _ACTIVE)
        self.columns = 0
        for name, factors in read.items():
            for part in factors:  # 0 times NaN is NaN, for the tokens of other adapters too
                if not (part.a.isfinite().all() and part.b.isfinite().all()):
                    raise ModelError("an adapter holds numbers that are none", where=f"adapter {name!r}, {part.path}",
                                     found="NaN or infinity", expected="numbers", fix="use another checkpoint of it")
            widest = max((part.rank for part in factors), default=0)
            self._spans[name] = slice(self.columns, self.columns + widest)
            self.columns += widest
        if not self.by_peft:
            self._install(inner, read)

    def check(self, name: str | None) -> None:
        """Raises `OptionError` unless tokens may ask for `name`."""
        if (name is not None and name != BASE and name not in self.names) or (name == BASE and self.by_peft):
            raise OptionError("there is no such adapter here", where="adapter", found=name,
                              expected=", ".join(self.names) or "none: this model has no adapters by name",
                              fix="name one of these, or leave adapter out")

    @contextlib.contextmanager
    def applied(self, names: Sequence[str | None], counts: Sequence[int], kept: Tensor) -> Iterator[None]:
        """While it lasts, a forward pass is one of rows that lie end to end.

        Args:
            names: what each row asks for.
            counts: tokens of each row.
            kept: the tokens that the head is for.
        """
        if not self._spans:
            yield
            return
        asked = [self._spans.get(_ACTIVE if name is None else name, slice(0, 0)) for name in names]
        used = {(span.start, span.stop) for span in asked if span.stop > span.start}
        self._span = slice(min(used)[0], max(stop for _, stop in used)) if used else None
        if used and (len(used) > 1 or any(span.stop == span.start for span in asked)):
            rows = torch.zeros(len(asked), self._span.stop - self._span.start)  # type: ignore[union-attr]
            for row, span in zip(rows, asked, strict=True):
                if span.stop > span.start:
                    row[span.start - self._span.start:span.stop - self._span.start] = 1  # type: ignore[union-attr]
            mask = rows.repeat_interleave(torch.tensor(counts), 0).to(kept.device)
            self._mask, self._kept = mask, mask[kept]
        self._on = True
        try:
            yield
        finally:
            self._on, self._mask, self._kept, self._span = False, None, None, None

    @contextlib.contextmanager
    def applied_by(self, mask: Tensor) -> Iterator[None]:
        """As `applied`, for one token a row, by a mask [T, C] of all adapters that a recorded step reads."""
        if not self._spans:
            yield
            return
        self._on, self._span, self._mask, self._kept = True, slice(0, self.columns), mask, mask
        try:
            yield
        finally:
            self._on, self._mask, self._kept, self._span = False, None, None, None

    def row(self, name: str | None) -> list[float]:
        """A row of the mask that `applied_by` takes."""
        span = self._spans.get(_ACTIVE if name is None else name, slice(0, 0))
        return [float(span.start <= column < span.stop) for column in range(self.columns)]

    def close(self) -> None:
        """Take everything off the model again."""
        for module, forward in self._undo:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._undo = []

    def _install(self, inner: nn.Module, read: dict[str, list[Factors]]) -> None:
        found: dict[str, list[tuple[str, Factors]]] = {}
        for name, factors in read.items():
            for part in factors:
                found.setdefault(part.path, []).append((name, part))
        for path, module in inner.named_modules():
            if path in found:
                self._replace(module, *self._stacked(module, found[path]))
            elif is_adapted(module):
                self._replace(module, None, None)

    def _stacked(self, module: Any, parts: list[tuple[str, Factors]]) -> tuple[Tensor, Tensor]:
        """a [C, K], or [C, V] of an embedding, and b [C, N] with the scale in it."""
        first = parts[0][1]
        device = _base(module).weight.device
        a = torch.zeros(self.columns, first.a.shape[1])
        b = torch.zeros(self.columns, first.b.shape[0])
        for name, part in parts:
            begin = self._spans[name].start
            # PEFT scales what the factors make of a scaled embedding as well.
            scale = part.scale * float(getattr(_base(module), "embed_scale", 1.0) if part.embedding else 1.0)
            a[begin:begin + part.rank] = part.a
            b[begin:begin + part.rank] = part.b.T * scale
        return a.to(device), b.to(device)

    def _replace(self, module: Any, a: Tensor | None, b: Tensor | None) -> None:
        earlier = module.forward
        base = _base(module)
        without = earlier if base is module else base
        embeds = isinstance(base, nn.Embedding)

        @functools.wraps(earlier)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal a, b
            if not self._on:
                return earlier(x, *args, **kwargs)
            y = without(x)
            if a is None or b is None or self._span is None:
                return y
            if a.device != x.device:  # its layer's weights wait in host memory
                a, b = a.to(x.device), b.to(x.device)
            down = nn.functional.embedding(x, a.T)[..., self._span] if embeds \
                else nn.functional.linear(x.to(a.dtype), a[self._span])
            if self._mask is not None and self._kept is not None:
                down = down * (self._mask if down.shape[-2] == len(self._mask) else self._kept)
            return y + (down @ b[self._span]).to(y.dtype)

        self._undo.append((module, module.__dict__.get("forward")))
        module.forward = forward


def _base(module: Any) -> Any:
    return module.get_base_layer() if is_adapted(module) else module


def _own(model: Any) -> tuple[dict[str, list[Factors]], str]:
    """The factors of a model's own adapters, the active ones under no name; and why they are PEFT's business if so."""
    found: dict[str, list[Factors]] = {}
    if not hasattr(model, "peft_config"):
        return found, ""
    try:
        found[_ACTIVE] = lora_factors(model)
    except OptionError:  # none is active
        pass
    except ModelError as error:
        return {}, error.what
    for name in model.peft_config:
        try:
            found[name] = lora_factors(model, name)
        except (OptionError, ModelError) as error:
            say_once(f"the adapter {name!r} cannot be asked for by name: {error.what}")
    return found, ""


def _read(model: Any, folder: Path) -> list[Factors]:
    """The factors of an adapter in a folder. PEFT puts it on the model and takes it off again, so its rules hold."""
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError("no adapter lies here", where=str(folder), found="no adapter_model.safetensors with "
                         "adapter_config.json", expected="a folder that PEFT saved an adapter in",
                         fix="check the path")
    learnt = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if hasattr(model, "peft_config"):
        try:
            put_adapter(model, folder, is_trainable=False, name=_READING)
            return lora_factors(model, _READING)
        finally:
            if _READING in model.peft_config:
                model.delete_adapter(_READING)
            _put_back(model, learnt)
    adapted = None
    try:
        adapted = put_adapter(model, folder, is_trainable=False)
        return lora_factors(adapted)
    finally:
        if adapted is not None:
            adapted.unload()
        _put_back(model, learnt)


def _put_back(model: Any, learnt: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learnt[name])
