"""Text that a model writes by itself, to calibrate with where there is no data (https://arxiv.org/abs/2406.08464)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazelle.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"  # a private-use character, which no template writes
_BATCH = 32


def own_text(model: Any, tokenizer: "PreTrainedTokenizerBase", *, rows: int = 64, length: int = 128, seed: int = 0
             ) -> list[Tensor]:
    """Rows of ids that begin where a user would ask: the model writes question and answer.

    Args:
        model: with or without an adapter.
        tokenizer: without a chat template, rows begin with its first token alone.
        rows: how many.
        length: tokens that are written for each.
        seed: the same seed gives the same rows on the same device.
    """
    start = torch.tensor([_start(tokenizer)] * min(rows, _BATCH), device=model.device)
    written: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        while len(written) < rows:
            ids = model.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_p=0.95,
                                 top_k=0, temperature=1.0, max_new_tokens=length, eos_token_id=-1, pad_token_id=0)
            written += ids.cpu().unbind()
    return written[:rows]


def _start(tokenizer: Any) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        if ids := tokenizer(text.partition(_MARK)[0], add_special_tokens=False)["input_ids"]:
            return ids
    return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
