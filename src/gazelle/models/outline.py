"""What a Hugging Face model object needs memory for: an `engine.outline.Outline` of it, with or without its weights."""

from typing import Any

import torch
from torch import Tensor

from gazelle.adapters.unwrap import unwrap
from gazelle.engine.layer import Layer
from gazelle.engine.linear import Projection
from gazelle.engine.outline import LayerOutline, Outline
from gazelle.kernels.activation import MOST_PIECES
from gazelle.models.host_embedding import can_move_embedding
from gazelle.models.linears import base_linear
from gazelle.models.swap import engine_layer, linear_modules, swapped_layers
from gazelle.quantize.storage import NF4, Int8

# Bytes of optimizer state a trained number, by what the optimizer's name begins with; paged state is not on the device.
_STATE = {"paged": 0.0, "adamw_8bit": 2.03, "adamw_bnb_8bit": 2.03, "lion_8bit": 1.02, "lion": 4.0, "sgd": 0.0,
          "adafactor": 0.1, "rmsprop": 4.0}
_LIBRARIES = 160 * 2**20  # workspaces of the libraries that multiply matrices
_ADAM = 8.0  # two float32 moments


def outline_of(model: Any, optim: str = "adamw_torch", stored: str | None = None, precision: str = "auto") -> Outline:
    """The outline of an accelerated model.

    Args:
        model: whose layers all run on the engine (`runs_on_engine`), with its adapter; it may be on the meta device.
        optim: name of the optimizer.
        stored: how the layers' weights are going to be kept, "nf4" or "int8", for a model on the meta device.
        precision: as in `accelerate`.
    """
    inner = unwrap(model)
    modules = swapped_layers(model)
    layers = [engine_layer(module) for module in modules]
    embedding, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    tied = head is embedding
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    inside = {id(tensor) for layer in layers for tensor in _weights(layer)}
    counted = sum(parameter.nbytes for parameter in trained if id(parameter) in inside)
    # The gradient and the value, which is counted already if it is a layer's or the head's weight.
    in_head = sum(weight.nbytes for weight in {id(w): w for w in (embedding, head)}.values() if weight.requires_grad)
    numbers = sum(parameter.numel() for parameter in trained)
    itemsize = modules[0].input_layernorm.weight.element_size()
    dense_trained = any(id(parameter) in inside for parameter in trained)
    outlines = tuple(_layer_outline(layer, itemsize, None if dense_trained else stored, precision) for layer in layers)
    linears = {id(base_linear(linear).weight) for module in modules for linear in linear_modules(module)}
    skip = linears | {id(embedding), id(head), *map(id, trained)}
    norms = sum(tensor.nbytes for tensor in (*inner.parameters(), *inner.buffers()) if id(tensor) not in skip)
    return Outline(
        layers=outlines, hidden=head.shape[1], vocabulary=head.shape[0], itemsize=itemsize,
        embedding=embedding.nbytes, embedding_moves=can_move_embedding(model), head=0 if tied else head.nbytes,
        head_trains=head.requires_grad, others=norms + _LIBRARIES,
        trained=2 * sum(parameter.nbytes for parameter in trained) - counted - in_head,
        optimizer=int(numbers * _state_bytes(optim)),
    )


def _state_bytes(optim: str) -> float:
    return next((size for name, size in _STATE.items() if optim.startswith(name)), _ADAM)


def _weights(layer: Layer) -> list[Tensor]:
    """The tensors that projections are made of, adapters apart."""
    found: list[Tensor] = []
    for projection in layer.projections:
        for part in projection.parts:
            found += part.weight.tensors().values()
    return found


def _layer_outline(layer: Layer, itemsize: int, stored: str | None, precision: str) -> LayerOutline:
    kinds = {type(part.weight) for projection in layer.projections for part in projection.parts}
    if stored is None:
        stored = "nf4" if NF4 in kinds else "int8" if Int8 in kinds else "dense"
        weights = sum(_kept_bytes(projection) for projection in layer.projections)
    elif stored == "dense":
        weights = sum(_bordered_bytes(projection, itemsize) for projection in layer.projections)
    else:
        weights = sum(_quantised_bytes(stored, projection.N, projection.K) for projection in layer.projections)
    scratch = [0 if stored == "dense" else
               projection.N * projection.K if precision == "fp8" else _bordered_bytes(projection, itemsize)
               for projection in layer.projections]
    if precision == "fp8" and stored == "dense":
        scratch = [projection.N * projection.K for projection in layer.projections]
    borders = [projection.R for projection in layer.projections]
    gradients = sum(4 * tensor.numel() for tensor in layer.trainable)
    bordered = all(projection.matrix_shape()[1] == projection.K + projection.R for projection in layer.projections)
    return LayerOutline(layer.spec, (borders[0], borders[1], borders[2], borders[3]), weights,
                        (scratch[0], scratch[1], scratch[2], scratch[3]), gradients, stored,
                        sums=_bytes_of_sums(layer), bordered=bordered)


def _bytes_of_sums(layer: Layer) -> int:
    """What is summed beside the activation, if it is: gradients are gathered in place in training."""
    mlp = (layer.gate_up, layer.down)
    adapters = [part.adapter for projection in mlp for part in projection.parts if part.adapter is not None]
    trained = all(adapter.a.requires_grad and adapter.b.requires_grad for adapter in adapters)
    able = all(projection.has_kernel and not projection.has_dropout for projection in mlp)
    if (sizes := layer.sum_columns) is None or not trained or not able:
        return 0
    columns, widest = sizes
    return 4 * MOST_PIECES * layer.spec.intermediate * (columns + 2 * widest)


def _kept_bytes(projection: Projection) -> int:
    if projection.kept is not None:
        return projection.kept.nbytes
    return sum(part.weight.nbytes for part in projection.parts)


def _bordered_bytes(projection: Projection, itemsize: int) -> int:
    rows, columns = projection.matrix_shape()
    return rows * columns * itemsize


def _quantised_bytes(stored: str, N: int, K: int) -> int:
    if stored == "int8":
        return N * K + 4 * N
    blocks = -(-N * K // 64)
    return -(-N * K // 2) + blocks + 4 * -(-blocks // 256)


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal model without weights, for a config."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
