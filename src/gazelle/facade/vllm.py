"""`prepare_for_vllm`: from a model at hand to a folder that vLLM serves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.base.log import log_to_terminal
from gazelle.export.vllm import export_vllm, serve_command
from gazelle.facade.saving import loaded_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def prepare_for_vllm(model: Any, output_dir: str | Path, max_batch_size: int = 8, quantization: str | None = None,
                     dtype: "str | torch.dtype" = "float16", tokenizer: "PreTrainedTokenizerBase | None" = None,
                     calibration: Any = None, merge: bool = True) -> str:
    """Write a model as vLLM serves it, and say how.

    Args:
        model: with or without an adapter, which is merged.
        output_dir: a folder of its own, which appears whole or not at all. `serve.sh` in it serves the model, and
            `vllm.json` holds the command and its settings.
        max_batch_size: requests that vLLM answers at a time (`--max-num-seqs`).
        quantization: None for 16 bits; "fp8", weights in e4m3 with a step a row and inputs rounded as they come;
            "awq" or "gptq", 4 bits. What is quantised is merged first.
        dtype: of the computation and of what is not quantised: "float16" or "bfloat16", or "float32" without
            quantisation.
        tokenizer: left out: the one that the model was loaded with.
        calibration: for awq and gptq, data like the training data: a file, folder, list of rows, data set or hub name
            in any format that training takes. Left out: text that the model itself writes.
        merge: False serves the adapter by itself on its base, with `--enable-lora`.

    Returns:
        The command that serves it.

    Raises:
        UserError: before anything is written, for an option, an adapter or a folder that cannot be used; while
            writing, for a tensor with NaN. Then an earlier export in the folder is what it was.
    """
    log_to_terminal()
    export_vllm(model, tokenizer or loaded_tokenizer(model), output_dir, quantization=quantization,
                calibration=calibration, max_batch_size=max_batch_size, dtype=dtype, merge=merge)
    return serve_command(output_dir)
