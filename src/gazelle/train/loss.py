"""The loss of a batch: cross entropy on labelled positions alone, so that unlabelled ones never reach the vocabulary.

Shapes: T tokens of a packed batch, B × L of a padded one, n labelled positions, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 — the field's name for it

from gazelle.train.dataset import labelled_targets


def batch_loss(
    model: torch.nn.Module, inputs: dict[str, Any], label_smoothing: float = 0.0
) -> tuple[torch.Tensor, Any]:
    """Sum of the cross entropies of a batch, in nats, and the model's output.

    Args:
        model: a causal model whose forward takes `logits_to_keep` when the batch is packed.
        inputs: what a collator made; `labels` [1, T] (packed) or [B, L] (padded) use -100 for "not learnt".
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    if "cu_seq_lens_q" in inputs:
        positions, targets = labelled_targets(labels)
        output = model(**inputs, logits_to_keep=positions, use_cache=False)
        logits = output.logits[0]
    else:
        output = model(**inputs, use_cache=False)
        logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing)
    return loss, output
