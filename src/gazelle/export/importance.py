"""How much the columns of each weight matter: mean squares of what a model's linear layers are fed on the user's rows.

An error in a column of W counts as much as the numbers that it is multiplied with: E|(W - W')x|² is the sum over
columns of error² · E x² if columns of x are uncorrelated. It is what llama.cpp calls an importance matrix.
Shape legend: T tokens of a row, K inputs of a linear layer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.base.log import logger
from gazelle.data.calibration import calibration_ids, source_name
from gazelle.models.modes import evaluating
from gazelle.quantize.bnb import is_quantized_linear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, LENGTH = 128, 512


def importance_of(model: Any, tokenizer: "PreTrainedTokenizerBase", data: Any) -> tuple[dict[str, Tensor], int]:
    """(importance by the weight's name, number of rows) of `model` on up to 128 rows of `data`, of 512 tokens at most.

    Raises:
        UserError: `data` cannot be read, or what layers are fed is not finite.
    """
    rows = calibration_ids(data, tokenizer, rows=ROWS, length=LENGTH)
    logger.info("Looking at %d rows, %s tokens, for what matters in each weight.", len(rows),
                f"{sum(map(len, rows)):,}")
    return measure_importance(model, rows), len(rows)


def measure_importance(model: Any, rows: list[Tensor]) -> dict[str, Tensor]:
    """Mean squares [K], float32 on the CPU, by names such as "model.layers.0.self_attn.q_proj.weight".

    Layers are run with what is on them, an adapter or quantised weights. A row is run at a time, so that memory is that
    of one row's pass; logits are never made. The head's weight has what the last norm gives; a tied one as well.

    Args:
        model: a causal model, with or without an adapter; its layers may be on the engine.
        rows: ids [T] each.

    Raises:
        ModelError: what a layer is fed is not finite.
    """
    base = unwrap(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    linears = dict(_linears(base, ""))
    sums: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        squares = x.detach().flatten(0, -2).float().square().sum(0).double()
        sums[path] = sums[path] + squares if path in sums else squares

    hooks = [module.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
             for path, module in linears.items() if module is not head]
    head_path = next((path for path, module in linears.items() if module is head), "")
    try:
        with evaluating(base), torch.no_grad():
            for row in rows:
                ids = row[None].to(base.get_input_embeddings().weight.device)
                states = decoder(input_ids=ids, use_cache=False).last_hidden_state
                if head_path:
                    add(head_path, states)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(map(len, rows))
    found = {f"{path}.weight": (total / tokens).float().cpu() for path, total in sums.items()}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise ModelError("what a layer is fed is not finite", where=name, found="NaN or infinity",
                             expected="finite numbers", fix="use an earlier checkpoint, or load with dtype=\"float32\"")
    return found


def imatrix_fields(data: Any, rows: int, entries: int) -> dict[str, Any]:
    """What llama.cpp notes in a file about the importance matrix that it was quantised with."""
    return {"quantize.imatrix.file": f"measured by gazelle on at most {LENGTH} tokens of a row",
            "quantize.imatrix.dataset": source_name(data), "quantize.imatrix.entries_count": entries,
            "quantize.imatrix.chunks_count": rows}


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, plain, quantised, with an adapter or trained in full, whose insides are left out."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        layer: Any = child
        plain = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        plain = getattr(plain, "original_module", plain)  # PEFT's, of a module to save
        if isinstance(plain, nn.Linear) or is_quantized_linear(plain):
            yield inner, child
        else:
            yield from _linears(child, inner)
