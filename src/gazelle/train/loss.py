"""The loss of a batch: cross entropy on labelled positions alone, so that unlabelled ones never reach the vocabulary.

Shapes: T tokens of a packed batch, B × L of a padded one, n labelled positions, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 — the field's name for it

from gazelle.kernels.attention import Rows
from gazelle.models.head import Labelled, has_fused_head
from gazelle.train.dataset import labelled_targets

# What a collator says of a batch that is no argument of a model.
NOTES = ("labels", "positions", "targets", "tokens", "sizes", "uniform", "teacher")


def batch_loss(
    model: torch.nn.Module, inputs: dict[str, Any], label_smoothing: float = 0.0, *, logits: bool = False
) -> tuple[torch.Tensor, Any]:
    """Sum of the cross entropies of a batch, in nats, and the model's output.

    Args:
        model: a causal model whose forward takes `logits_to_keep` when the batch is packed.
        inputs: what a collator made; `labels` [1, T] (packed) or [B, L] (padded) use -100 for "not learnt".
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        logits: the output is to have logits, so the head is not fused with the loss.
    """
    arguments = {name: value for name, value in inputs.items() if name not in NOTES}
    labels = inputs["labels"]
    positions: Any = inputs.get("positions")
    targets: Any = inputs.get("targets")
    packed = "cu_seq_lens_q" in inputs
    if packed:
        arguments["gazelle_rows"] = packed_rows(inputs)
    fused = has_fused_head(model) and not logits
    if (fused or packed) and (positions is None or targets is None):
        positions, targets = labelled_targets(labels)
    if fused:
        labelled = Labelled(positions, targets, label_smoothing)
        output = model(**arguments, gazelle_labelled=labelled, use_cache=False)
        return output.loss, output
    if packed:
        output = model(**arguments, logits_to_keep=positions, use_cache=False)
        scores = output.logits[0]
    else:
        output = model(**arguments, use_cache=False)
        scores, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = F.cross_entropy(scores.float(), targets, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing)
    return loss, output


def packed_rows(inputs: dict[str, Any]) -> Rows:
    """How the rows of a packed batch lie."""
    starts = inputs["cu_seq_lens_q"]
    return Rows(len(starts) - 1, inputs["max_length_q"], uniform=inputs.get("uniform", False), cu_seqlens=starts,
                sizes=inputs.get("sizes"))


def labelled_logits(model: Any, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """[n, V]: a model's logits at positions in the tokens of all rows of a batch."""
    arguments = {name: value for name, value in inputs.items() if name not in NOTES}
    if "cu_seq_lens_q" not in inputs:
        return model(**arguments, use_cache=False).logits.flatten(0, 1)[positions]
    return model(**arguments, gazelle_rows=packed_rows(inputs), logits_to_keep=positions, use_cache=False).logits[0]


def loss_sums(model: torch.nn.Module, batches: Iterable[dict[str, Any]],
              autocast: Callable[[], AbstractContextManager[Any]]) -> torch.Tensor:
    """[sum of the cross entropies, labelled tokens] (float64, on the CPU) of batches, without gradients.

    Args:
        model: evaluated in evaluation mode, and left in the mode it was in.
        batches: what a collator made, on the device.
        autocast: what to compute in.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    try:
        with torch.no_grad():
            for inputs in batches:
                with autocast():
                    total, _ = batch_loss(model, inputs)
                sums += torch.tensor([total.item(), (inputs["labels"] != -100).sum().item()], dtype=torch.float64)
    finally:
        model.train(was_training)
    return sums
