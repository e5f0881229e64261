"""Whether a batch's activations fit in memory, so that `use_gradient_checkpointing="auto"` has an answer.

A deliberately high estimate, good for one yes or no; a plan that predicts memory by part belongs to the engine.
"""

import heapq
from typing import Any

import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.log import logger
from gazelle.data.encode import Encoded
from gazelle.train.config import SFTConfig

# Tensors of hidden (and of intermediate) size that autograd keeps for one decoder layer with LoRA on all linears:
# inputs of norms and linears, q, k, v, attention output; gate, up, their product and its input.
HIDDEN_KEPT, INTERMEDIATE_KEPT = 16, 6
OPTIMIZER_BYTES = 16  # per trainable parameter: gradient and two moments in float32, and slack for a master copy


def activation_bytes(config: Any, tokens: int, labelled: int, itemsize: int) -> int:
    """Bytes that autograd keeps for a batch without checkpointing.

    Args:
        config: a decoder's config, with `hidden_size`, `intermediate_size`, `num_hidden_layers` and `vocab_size`.
        tokens: in the batch, padding included.
        labelled: tokens that reach the head, whose logits are kept in the compute type and twice in float32.
        itemsize: bytes of the compute type.
    """
    layer = HIDDEN_KEPT * config.hidden_size + INTERMEDIATE_KEPT * config.intermediate_size
    return tokens * config.num_hidden_layers * layer * itemsize + labelled * config.vocab_size * (itemsize + 8)


def choose_checkpointing(model: Any, rows: Encoded, settings: SFTConfig, *, packed: bool) -> bool:
    """Turn checkpointing on if the activations of a batch would not fit in what the GPU has free; True if it did.

    Nothing is done on a CPU, for a model whose checkpointing was set to True or False, or for a config without the
    usual sizes.

    Args:
        model: the model, with or without an adapter.
        rows: what it is to be trained on.
        settings: batch size, packing and longest row.
        packed: rows lie end to end, and only labelled tokens reach the head.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    chosen = getattr(model, "use_gradient_checkpointing", "auto")
    if model.device.type != "cuda" or chosen in (True, False) or base.is_gradient_checkpointing:
        return False
    if not all(hasattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")):
        return False
    tokens, labelled = largest_batch(rows, settings, packed=packed)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = torch.cuda.mem_get_info(model.device)[0] - OPTIMIZER_BYTES * trainable
    needed = activation_bytes(config, tokens, labelled, model.dtype.itemsize)
    if needed <= free:
        return False
    logger.info("Activations of a batch may need %.1f GB and %.1f GB are free: gradient checkpointing is on.",
                needed / 1e9, free / 1e9)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return True


def largest_batch(rows: Encoded, settings: SFTConfig, *, packed: bool) -> tuple[int, int]:
    """Tokens, and tokens that reach the head, of the largest micro-batch that these rows can make."""
    count = settings.per_device_train_batch_size
    lengths = heapq.nlargest(count, (len(row.input_ids) for row in rows.examples))
    if not packed:
        return count * lengths[0], count * lengths[0]
    if settings.packing:
        tokens = count * (settings.max_length or lengths[0])
        return tokens, tokens
    return sum(lengths), sum(heapq.nlargest(count, (len(row.labels) - list(row.labels).count(-100)
                                                    for row in rows.examples)))
