"""The frozen weights of a model's first layers, streamed from host memory while it trains."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gazelle.engine.stream import WeightStream
from gazelle.models.linears import base_linear
from gazelle.models.swap import engine_layer, linear_modules, swapped_layers
from gazelle.quantize.bnb import is_four_bits, is_quantized_linear


def can_stream(model: Any) -> bool:
    """True if the weights of every layer are frozen, and dense or in four bits."""
    for module in swapped_layers(model):
        for linear in linear_modules(module):
            base = base_linear(linear)
            if base.weight.requires_grad or (is_quantized_linear(base) and not is_four_bits(base)):
                return False
    return True


@contextlib.contextmanager
def weights_streamed(model: Any, count: int) -> Iterator[None]:
    """While it lasts, the weights of the first `count` layers lie in pinned host memory.

    Passes that the engine does not run, as in `generate`, bring a layer's weights to the device while it runs.

    Args:
        model: one for which `can_stream` is true.
        count: at least 1.
    """
    modules = swapped_layers(model)[:count]
    layers = [engine_layer(module) for module in modules]
    stream = WeightStream([layer.projections for layer in layers])
    with contextlib.ExitStack() as stack:
        for number, (module, layer) in enumerate(zip(modules, layers, strict=True)):
            home = _Home([tensor for linear in linear_modules(module) for tensor in _tensors(base_linear(linear))],
                         stream.host_tensors(number))
            layer.stream = stream, number
            stack.enter_context(home.left(module))
        yield


class _Home:
    """Where the tensors of a layer are: on the device, or in host memory with an empty one in their place."""

    def __init__(self, tensors: list[Tensor], hosts: list[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._tensors, self._hosts = tensors, hosts
        self._device = tensors[0].device

    def leave(self) -> None:
        """Free the device's memory."""
        for tensor in self._tensors:
            tensor.data = tensor.data.new_empty(0)

    def come(self) -> None:
        """Put the tensors back on the device; if it has no room, they are those in host memory, and whole."""
        self.show()
        self._fill([host.to(self._device) for host in self._hosts])

    def show(self) -> None:
        """Let the tensors be those in host memory."""
        self._fill(self._hosts)

    def _fill(self, sources: list[Tensor]) -> None:
        for tensor, source, shape in zip(self._tensors, sources, self._shapes, strict=True):
            tensor.data = source.view(tensor.dtype).view(shape)

    @contextlib.contextmanager
    def left(self, module: Any) -> Iterator[None]:
        """While it lasts, the layer's weights are in host memory; a checkpoint takes them from there."""
        self.leave()
        module.gazelle.home = self.visited
        hooks = (module.register_state_dict_pre_hook(lambda *_: self.show()),
                 module.register_state_dict_post_hook(lambda *_: self.leave()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            module.gazelle.home = None
            module.gazelle.layer = None  # it reads from the stream's buffers
            self.come()

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """On the device while it lasts."""
        self.come()
        try:
            yield
        finally:
            self.leave()


def _tensors(base: Any) -> list[Tensor]:
    """The tensors behind a linear layer's storage, in the order of `Storage.tensors`."""
    if not is_quantized_linear(base):
        return [base.weight]
    state = base.weight.quant_state
    return [base.weight, state.absmax, *([state.state2.absmax] if state.nested else [])]


