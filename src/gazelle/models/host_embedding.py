"""A frozen embedding kept in host memory while a model trains: a step reads few rows, and the GPU needs the room."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gazelle.adapters.unwrap import unwrap
from gazelle.kernels.gather import gather_rows, pinned


def can_move_embedding(model: Any) -> bool:
    """True if the embedding is frozen, plain and not the head's as well."""
    inner = unwrap(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return isinstance(embedding, torch.nn.Embedding) and not tied and not embedding.weight.requires_grad \
        and embedding.max_norm is None


@contextlib.contextmanager
def embedding_on_host(model: Any) -> Iterator[None]:
    """While it lasts, the embedding's weight [V, H] lies in pinned host memory; a view of one number stands in for it.

    Args:
        model: one for which `can_move_embedding` is true.
    """
    embedding = unwrap(model).get_input_embeddings()
    weight = embedding.weight
    device, table = weight.device, pinned(weight.data)
    original = type(embedding)

    class HostEmbedding(original):  # type: ignore[valid-type, misc]
        def forward(self, ids: Tensor) -> Tensor:
            rows = gather_rows(table, ids.flatten()).view(*ids.shape, -1)
            scale = getattr(self, "embed_scale", None)  # the Gemma families'
            return rows if scale is None else rows * scale.to(rows.dtype)

    weight.data = weight.data.new_zeros(1, 1).expand(table.shape)
    embedding.__class__ = HostEmbedding
    # A checkpoint that is written meanwhile holds the table.
    hook = embedding.register_state_dict_post_hook(
        lambda _, state, prefix, __: state.update({f"{prefix}weight": table}))
    try:
        yield
    finally:
        hook.remove()
        embedding.__class__ = original
        weight.data = table  # whole, should the device have no room for it
        weight.data = table.to(device)
