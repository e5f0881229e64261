"""Saves a model in fewer bits in the format that vLLM reads: merged first, then quantised, layer by layer.

fp8 needs no data. AWQ and GPTQ walk through the layers with the rows they are calibrated with: what a layer is fed
comes from the layers before it as they were written.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gazelle.adapters.merge import merged_tensors
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError, nearest
from gazelle.base.log import logger
from gazelle.data.calibration import calibration_ids, source_name
from gazelle.export.compressed import Format, format_of, fp8_steps, group_for
from gazelle.export.layers import Inputs, Layers
from gazelle.export.own_text import own_text
from gazelle.export.smooth import check_family, smooth
from gazelle.models.checkpoint import check_finite
from gazelle.models.plain import inner_linears, plain_model
from gazelle.models.save import QUANTISED, check_readable, check_target, checked_options, saved_checkpoint
from gazelle.models.saved import CheckpointOutput, SaveReport
from gazelle.quantize.awq import output_error
from gazelle.quantize.gptq import gptq
from gazelle.quantize.groups import Grid, Steps, fit, rounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_quantised(model: Any, tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path, save_method: str, *,
                   calibration: Any = None, rows: int = 128, length: int = 512, act_order: bool = True,
                   max_shard_size: str | int = "5GB", dtype: "str | torch.dtype | None" = None) -> SaveReport:
    """Write `model` to `folder`, which appears whole or not at all. The model in memory stays as it is.

    The head and the embedding stay in 16 bits. Weights decompress, with the compressed-tensors library, to exactly
    those that the layers behind were calibrated with.

    Args:
        model: with or without an adapter, quantised by bitsandbytes or not.
        tokenizer: written beside it; renders the calibration data, so it is needed for awq and gptq.
        folder: an earlier saved model there is replaced when the new one is complete.
        save_method: "fp8" (weights with a step a row, inputs rounded token by token while it runs), "awq" (4 bits,
            https://arxiv.org/abs/2306.00978) or "gptq" (4 bits, https://arxiv.org/abs/2210.17323). 128 inputs share a
            step, or 64 or 32 where the model's sizes ask for it.
        calibration: for awq and gptq, data like the training data, as `calibration_ids` takes it, or rows of ids.
            Left out: text that the model itself writes.
        rows, length: of the calibration data, as in `calibration_ids`.
        act_order: gptq rounds the columns with the largest inputs first.
        max_shard_size: bytes a file, or a text such as "5GB".
        dtype: of what is not quantised and of the steps, as in `save_merged`.

    Returns:
        What was written, and how far it is from the merged model, for awq with its scales in it; beside the weights
        as `save_report.json`.

    Raises:
        OptionError: an unknown method, type or size.
        OutputError: as `save_merged`.
        ModelError: a family, adapter or size that this cannot be done with, or a tensor with NaN or infinity.
        DataError: as `calibration_ids`.
        MissingDependencyError: compressed-tensors is not installed.
    """
    target = Path(folder).expanduser().absolute()
    if save_method not in QUANTISED:
        raise OptionError("no such way to quantise a saved model", where="save_method", found=save_method,
                          expected=", ".join(QUANTISED), fix=nearest(save_method, QUANTISED))
    kept_as, limit = checked_options(dtype, max_shard_size, model)
    if kept_as == torch.float32:
        raise OptionError("steps are kept in 16 bits", where="dtype", found="float32",
                          expected="float16 or bfloat16", fix="change dtype")
    check_target(model, target, save_method)
    check_readable(unwrap(model))
    if save_method == "awq":
        check_family(unwrap(model).config.get_text_config())
    if save_method == "fp8":
        return _save_fp8(model, tokenizer, target, kept_as, limit)
    if tokenizer is None and not _are_ids(calibration):
        raise OptionError("there is no tokenizer to calibrate with", where="tokenizer", found="none",
                          expected="the model's tokenizer, or rows of ids as calibration", fix="pass tokenizer=")
    layers = Layers(model)
    _check_linear(layers.plain)
    widths = {f"{layers.path}.{number}.{name}": linear.in_features
              for number in range(len(layers.modules)) for name, linear in layers.linears(number).items()}
    group = group_for(widths)
    grid = Grid(group, save_method == "gptq", kept_as)
    kept = format_of(save_method, group=group, act_order=act_order, kept_whole=_others(layers.plain, widths))
    ids, source = _calibration(model, tokenizer, calibration, rows, length)
    counts = {"rows": len(ids), "tokens": sum(map(len, ids))}
    logger.info("%s: calibrated with %d rows, %d tokens (%s)", save_method, *counts.values(), source)
    with saved_checkpoint(model, tokenizer, target, save_method, dtype=kept_as, limit=limit,
                          few_bits=_numbers(layers.plain, widths), quantization=kept.config) as (output, tensors):
        output.report.settings |= {"group": group, "calibration": source} | counts
        if save_method == "gptq":
            output.report.settings["act_order"] = act_order
        fed = False
        for number, part in itertools.groupby(tensors, lambda item: layers.number_of(item[0])):
            if number is None:
                for name, tensor in part:
                    written = output.add(name, tensor)
                    if not fed:
                        layers.load([(name, written)])
                continue
            if not fed:
                layers.feed(ids)
                fed = True
            _calibrated_layer(layers, number, dict(part), output, kept, grid, act_order)
    return output.report


def _save_fp8(model: Any, tokenizer: Any, target: Path, dtype: torch.dtype, limit: int) -> SaveReport:
    plain = plain_model(model)
    _check_linear(plain)
    linears = inner_linears(plain)
    kept = format_of("fp8", group=0, act_order=False, kept_whole=_others(plain, linears))
    with saved_checkpoint(model, tokenizer, target, "fp8", dtype=dtype, limit=limit,
                          few_bits=_numbers(plain, linears), quantization=kept.config) as (output, tensors):
        for name, tensor in tensors:
            if not name.endswith(".weight") or name.removesuffix(".weight") not in linears:
                output.add(name, tensor)
                continue
            check_finite([(name, tensor)], "the merged model")
            parts, weight = kept.pack(tensor.float(), fp8_steps(tensor.float(), dtype))
            output.add_quantised(name, tensor, weight, parts)
    return output.report


def _calibrated_layer(layers: Layers, number: int, tensors: dict[str, Tensor], output: CheckpointOutput, kept: Format,
                      grid: Grid, act_order: bool) -> None:
    """Quantise a layer, write it, and bring the rows through it as it was written."""
    check_finite(tensors.items(), "the merged model")
    layers.load(tensors.items())
    layer, prefix = layers.modules[number], f"{layers.path}.{number}."
    names = list(tensors)
    tensors.clear()
    fed = layers.inputs(number)
    if unfed := set(layers.linears(number)) - {name for inputs in fed for name in inputs.names}:
        raise ModelError("a linear layer is not used", where=prefix + min(unfed), found="no inputs",
                         expected="a layer that is fed by every row", fix="export without calibration: fp8")
    if not grid.symmetric:
        smooth(layer, fed, layers.plain.config.get_text_config(), grid)
    for inputs in fed:
        _quantise_together(layer, inputs, prefix, output, kept, grid, act_order)
    linears = {f"{prefix}{name}.weight" for inputs in fed for name in inputs.names}
    for name in names:
        if name not in linears:
            layers.load([(name, output.add(name, layers.plain.state_dict()[name]))])
    layers.advance(number)
    layers.drop(number)


def _quantise_together(layer: nn.Module, inputs: Inputs, prefix: str, output: CheckpointOutput, kept: Format,
                       grid: Grid, act_order: bool) -> None:
    """Linear layers with one input: their rows are rounded independently, so they are rounded as one matrix."""
    modules: list[Any] = [layer.get_submodule(name) for name in inputs.names]
    weight = torch.cat([module.weight.data for module in modules])
    if grid.symmetric:
        numbers, steps = gptq(weight, inputs.gram, grid, act_order=act_order)
    else:
        steps = fit(weight, grid, inputs.gram.diagonal())
        numbers = rounded(weight, steps, grid)
    sizes = [module.out_features for module in modules]
    for name, module, number, step, zero in zip(inputs.names, modules, numbers.split(sizes), steps.step.split(sizes),
                                                steps.zero.split(sizes), strict=True):
        parts, read_back = kept.pack(number.to(grid.dtype), Steps(step, zero))
        merged = module.weight.data
        output.add_quantised(f"{prefix}{name}.weight", merged, read_back, parts)
        whole = output_error(merged, inputs.gram)
        off = output_error(read_back.float() - merged, inputs.gram)
        output.report.output_errors[prefix + name] = (off / whole) ** 0.5 if whole else 0.0
        module.weight.data.copy_(read_back)


def _calibration(model: Any, tokenizer: Any, data: Any, rows: int, length: int) -> tuple[list[Tensor], str]:
    """Rows of ids, and where they come from."""
    if data is None:
        check_finite(merged_tensors(model), "the merged model")  # with NaN nothing can be drawn, and no tensor is named
        return own_text(model, tokenizer), "text that the model wrote"
    if _are_ids(data):
        return data, "rows of ids"
    return calibration_ids(data, tokenizer, rows=rows, length=length), source_name(data)


def _are_ids(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(row, Tensor) for row in data)


def _check_linear(plain: Any) -> None:
    for name, parameter in plain.named_parameters():
        if parameter.ndim > 2:
            raise ModelError("only linear layers can be quantised", where=name,
                             found=f"a weight of {parameter.ndim} dimensions, as of experts",
                             expected="a model without experts", fix="export without quantisation")


def _others(plain: Any, quantised: Any) -> list[str]:
    return [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name not in quantised]


def _numbers(plain: Any, names: Any) -> int:
    return sum(plain.get_submodule(name).weight.numel() for name in names)
