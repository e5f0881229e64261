"""Rotary frequencies that a traced graph can choose between, where transformers chooses in Python."""

from typing import Any

import torch
from torch import Tensor, nn


class LongRope(nn.Module):
    """LongRoPE: one set of frequencies for rows within the original context, another for longer ones.

    Stands for transformers' rotary embedding of Phi-3, with the same results (https://arxiv.org/abs/2402.13753).
    """

    short: Tensor
    long: Tensor

    def __init__(self, config: Any) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        super().__init__()
        self.original = int(config.rope_parameters.get("original_max_position_embeddings")
                            or config.original_max_position_embeddings)
        init, device = ROPE_INIT_FUNCTIONS["longrope"], torch.device("cpu")
        short, self.magnitude = init(config, device)
        long, _ = init(config, device, seq_len=self.original + 1)
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long", long, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, 2·frequencies] in the type of `x`, for positions [B, T]."""
        frequencies = torch.where(position_ids.max() + 1 > self.original, self.long, self.short)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.magnitude).to(x.dtype), (angles.sin() * self.magnitude).to(x.dtype)


def replace_long_rope(model: Any) -> None:
    """Put `LongRope` into a model whose config asks for it, in place."""
    if (model.config.rope_parameters or {}).get("rope_type") == "longrope":
        model.model.rotary_emb = LongRope(model.config)
