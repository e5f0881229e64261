"""A model's decoder layers one at a time, on the rows that a quantiser is calibrated with.

Only one layer's weights are in memory, in float32 on the model's device, and the hidden states of all rows.

Shapes: B rows of a batch, T tokens, H hidden, N outputs and K inputs of a linear layer.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.models.plain import plain_model

_BATCH = 4096  # tokens, padding counted


@dataclass
class Inputs:
    """What the linear layers `names` of a layer are fed, which is the same for all of them.

    Attributes:
        gram: [K, K] mean of x xᵀ.
        magnitude: [K] mean of |x|.
    """

    names: tuple[str, ...]
    gram: Tensor
    magnitude: Tensor


class _ReachedError(Exception):
    """A row has come as far as it has to; no error."""


class Layers:
    """The layers of the plain model that `model` amounts to.

    Args:
        model: with or without an adapter, quantised or not; only its buffers are read here.

    Raises:
        ModelError: its layers are not found.
    """

    def __init__(self, model: Any) -> None:
        base = unwrap(model)
        self.device = next(base.parameters()).device
        self.plain = plain_model(model)
        self.plain.set_attn_implementation(_attention(base))
        count = self.plain.config.get_text_config().num_hidden_layers
        found = [(name, module) for name, module in self.plain.named_modules()
                 if isinstance(module, nn.ModuleList) and len(module) == count]
        if not found:
            raise ModelError("the layers of this kind of model are not where they are looked for",
                             where=type(base).__name__, found=f"no list of {count} layers",
                             expected="a causal language model of decoder layers", fix="export without quantisation")
        self.path, self.modules = found[0]
        _take_buffers(self.plain, base, self.device)
        self._forwards = [module.forward for module in self.modules]
        self._states: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._kept: list[Tensor] = []

    def number_of(self, name: str) -> int | None:
        """The layer to which a tensor belongs, or None."""
        rest = name.removeprefix(f"{self.path}.")
        return int(rest.partition(".")[0]) if rest != name else None

    def linears(self, number: int) -> dict[str, nn.Linear]:
        """The linear layers of a layer, by their names within it."""
        return {name: module for name, module in self.modules[number].named_modules() if isinstance(module, nn.Linear)}

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take copies of tensors, in float32, under their names in the whole model."""
        for name, tensor in tensors:
            wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
            _put(self.plain, name, tensor.to(self.device, wide, copy=True))

    def drop(self, number: int) -> None:
        """Let go of a layer's weights."""
        for name, parameter in list(self.modules[number].named_parameters()):
            _put(self.modules[number], name, parameter.to("meta"))

    def feed(self, rows: list[Tensor]) -> None:
        """Bring rows of ids [T] before the first layer. What they pass on the way must have been loaded.

        They are padded on the right, where causal attention does not look.
        """
        ordered = sorted(rows, key=len)
        while ordered:
            longest = len(ordered[-1])
            batch = ordered[-max(1, _BATCH // longest):]
            del ordered[-len(batch):]
            self._rows.append(nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.device))
            lengths = torch.tensor([len(row) for row in batch], device=self.device)
            self._kept.append(torch.arange(longest, device=self.device) < lengths[:, None])

        def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            self._states.append(hidden)
            raise _ReachedError

        for ids in self._rows:
            self._run(0, keep, {"input_ids": ids})
        self._put_embeddings_away()

    def advance(self, number: int) -> None:
        """Bring all rows through a layer as it is now."""
        def through(index: int) -> Callable[..., Any]:
            def forward(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                out = self._forwards[number](self._states[index], *args, **kwargs)
                self._states[index] = out[0] if isinstance(out, tuple) else out
                raise _ReachedError
            return forward

        for index, state in enumerate(self._states):
            self._run(number, through(index), {"inputs_embeds": state})

    def inputs(self, number: int) -> list[Inputs]:
        """What the linear layers of a layer are fed, once for those that share it. The rows stay before the layer."""
        found: dict[tuple[str, ...], Inputs] = {}
        tokens = sum(int(kept.sum()) for kept in self._kept)
        for index, state in enumerate(self._states):
            for names, fed in self._fed(number, index, state):
                x = fed[self._kept[index]].float()
                if names not in found:
                    found[names] = Inputs(names, x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
                found[names].gram.addmm_(x.T, x, alpha=1 / tokens)
                found[names].magnitude.add_(x.abs().sum(0), alpha=1 / tokens)
        return list(found.values())

    def _fed(self, number: int, index: int, state: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
        """The inputs of a batch, each with the linear layers that get it."""
        seen: dict[int, tuple[list[str], Tensor]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen.setdefault(id(args[0]), ([], args[0]))[0].append(name)
            return hook

        def through(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._forwards[number](state, *args, **kwargs)
            raise _ReachedError

        handles = [module.register_forward_pre_hook(note(name)) for name, module in self.linears(number).items()]
        try:
            self._run(number, through, {"inputs_embeds": state})
        finally:
            for handle in handles:
                handle.remove()
        return [(tuple(names), fed) for names, fed in seen.values()]

    def _run(self, number: int, forward: Callable[..., Tensor], given: dict[str, Tensor]) -> None:
        """Run the model, whose own code makes masks and positions, up to a layer whose forward pass is `forward`."""
        for index, module in enumerate(self.modules):
            module.forward = forward if index == number else _pass
        try:
            with torch.no_grad():
                self.plain(**given, use_cache=False)
        except _ReachedError:
            return
        raise ModelError("a layer of this kind of model is not reached", where=f"{self.path}.{number}",
                         found=type(self.plain).__name__, expected="decoder layers that run one after the other",
                         fix="export without quantisation")

    def _put_embeddings_away(self) -> None:
        inside = {id(parameter) for parameter in self.modules.parameters()}
        for name, parameter in list(self.plain.named_parameters()):
            if id(parameter) not in inside and not parameter.is_meta:
                _put(self.plain, name, parameter.to("meta"))


def _pass(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _take_buffers(plain: Any, base: Any, device: torch.device) -> None:
    """What is no parameter, such as rotary frequencies, which some modules also hold as plain attributes."""
    for name, module in list(plain.named_modules()):
        if not module._buffers:
            continue
        own = base.get_submodule(name)
        if not module._parameters and not list(module.children()):
            plain.set_submodule(name, copy.deepcopy(own).to(device))
            continue
        for last in module._buffers:
            inside = next(part for part in own.modules() if last in part._buffers)  # an adapter may lie around it
            _put(module, last, inside._buffers[last].detach().to(device))


def _attention(base: Any) -> str:
    """Hugging Face's attention that the model runs with; "eager" where it has a soft-cap, which others leave out."""
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    chosen = str(base.config._attn_implementation)
    return chosen if chosen in ("sdpa", "eager") else "sdpa"


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = root.get_submodule(path)
    if last in module._buffers:
        module._buffers[last] = tensor
    else:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
