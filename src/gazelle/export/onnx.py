"""Exports a model to ONNX with a cache of keys and values, as runtimes for text generation take it.

torch.onnx traces transformers' own model. Inputs and outputs have the names that Optimum gives them, so its
`ORTModelForCausalLM` takes the file as well.
Shape legend: B rows, T new tokens, P tokens in the cache, G key-value heads, D a head's size, V vocabulary.
"""

import contextlib
import logging
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.merge import merged_tensors
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError, OutputError, nearest
from gazelle.base.files import check_writable, scratch_folder, write_text
from gazelle.base.log import logger
from gazelle.base.optional import require
from gazelle.export.checks import check_no_folder, text_config
from gazelle.export.gguf_rope import head_size
from gazelle.export.onnx_rope import replace_long_rope
from gazelle.models.checkpoint import check_finite
from gazelle.models.families import FAMILIES
from gazelle.models.plain import plain_model
from gazelle.models.save import check_readable, check_space, still_tied

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_INLINE = 2**31 - 2**26  # a file of protobuf ends at 2 GiB; weights beyond go into a file of their own
_GRAPH = 1 << 24  # allowed for the graph itself
_LONGEST = 4096  # tokens in the cache that the line for TensorRT allows at most


def export_onnx(model: Any, path: str | Path, *, dtype: "str | torch.dtype | None" = None) -> list[Path]:
    """Write `model`, an adapter merged, to the ONNX file `path`. The model in memory stays as it is.

    Inputs: input_ids [B, T], attention_mask [B, P + T], position_ids [B, T], all int64, and for each layer N
    past_key_values.N.key and .value [B, G, P, D]. Outputs: logits [B, T, V], present.N.key and .value [B, G, P + T, D].
    B, T and P are free, P may be 0. Weights of 2 GB and more lie in a file beside it, `path` and ".data".
    The line of trtexec that makes a TensorRT engine of the file lies beside it, in `path` and ".trtexec.sh".

    Args:
        model: of a family that the engine knows, with or without an adapter, quantised by bitsandbytes or not.
        path: a name that ends in .onnx.
        dtype: of weights, cache and logits, "float32" (the default) or "float16".

    Returns:
        The file, and that of its weights if there is one.

    Raises:
        MissingDependencyError: onnx or onnxscript are not installed.
        OptionError: another dtype.
        ModelError: a model that cannot be exported, or weights with NaN or infinity; earlier files stay.
        OutputError: the files cannot be written, or the disk is too full.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    kept_as = _dtype(dtype)
    target = Path(path).expanduser().absolute()
    base = unwrap(model)
    config = text_config(base)
    _check_config(config)
    check_readable(base)
    check_writable(target.parent)
    check_no_folder(target)
    plain = plain_model(base)
    plain.set_attn_implementation("eager")  # with soft-caps, and masks without infinities: no NaN in padded rows
    tied = still_tied(model, dict(getattr(base, "all_tied_weights_keys", {})))
    size = sum(tensor.numel() for name, tensor in plain.named_parameters(remove_duplicate=tied)) * kept_as.itemsize
    check_space(target.parent, size + _GRAPH)
    _fill(plain, model, base, kept_as, tied)
    program = _traced(_WithCache(plain), config, kept_as)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = _write(program, target, external=size > _INLINE)
    line = target.with_name(target.name + ".trtexec.sh")
    write_text(line, f"#!/bin/sh\nexec {trtexec_command(target.name, config)}\n")
    line.chmod(0o755)
    logger.info("For TensorRT, in its folder: %s", line)
    return files


def trtexec_command(path: str | Path, config: Any, *, batch: int = 8, length: int = 512) -> str:
    """The line that makes a TensorRT engine of the file that `export_onnx` wrote for a model of `config`.

    Args:
        path: the file.
        config: of the model.
        batch: rows at most.
        length: new tokens at most; as many as are typical, a fourth of it, are what kernels are chosen for.
    """
    cached = min(_LONGEST, config.max_position_embeddings) - 1
    # (rows, new tokens, tokens in the cache): one token with nothing before it, a question, and the most there is.
    shapes = {"min": (1, 1, 0), "opt": (1, max(1, length // 4), cached // 4), "max": (batch, length, cached)}
    return shlex.join(["trtexec", f"--onnx={path}", f"--saveEngine={Path(path).with_suffix('.engine')}",
                       *(f"--{name}Shapes={_shapes(config, *sizes)}" for name, sizes in shapes.items())])


def _shapes(config: Any, rows: int, new: int, cached: int) -> str:
    sizes: dict[str, tuple[int, ...]] = {"input_ids": (rows, new), "attention_mask": (rows, cached + new),
                                         "position_ids": (rows, new)}
    for name in _cache_names("past_key_values", config):
        sizes[name] = (rows, config.num_key_value_heads, cached, head_size(config))
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items())


def _cache_names(start: str, config: Any) -> list[str]:
    return [f"{start}.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def _dtype(dtype: "str | torch.dtype | None") -> torch.dtype:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError("weights cannot be exported in this type", where="dtype", found=dtype,
                          expected=" or ".join(_DTYPES), fix=nearest(name, _DTYPES))
    return _DTYPES[name]


def _check_config(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise ModelError("this kind of model cannot be written as ONNX", where="config.json, model_type",
                         found=config.model_type, expected="one of " + ", ".join(FAMILIES),
                         fix="export to safetensors: save_pretrained_merged")
    rope = config.rope_parameters or {}
    kinds = {part.get("rope_type", "default") for part in (rope.values() if "full_attention" in rope else [rope])}
    if "dynamic" in kinds:
        raise ModelError("rotary frequencies that change with the length cannot be traced", where="config.json, "
                         "rope_parameters", found="rope_type dynamic", expected="another rope_type",
                         fix="export to safetensors: save_pretrained_merged")


def _fill(plain: Any, model: Any, base: Any, dtype: torch.dtype, tied: bool) -> None:
    """Give `plain` the merged weights, and buffers that no checkpoint has, such as rotary frequencies."""
    same = dict(getattr(base, "all_tied_weights_keys", {})) if tied else {}
    weights = {}
    for name, tensor in merged_tensors(model):
        if name not in same:
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            check_finite([(name, weights[name])], "the merged model")
    buffers = {name.replace("base_layer.", "").replace("original_module.", ""): buffer
               for name, buffer in base.named_buffers()}
    plain.load_state_dict(weights, strict=False, assign=True)
    for name, source in same.items():
        module, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(module), leaf, plain.get_parameter(source))
    for name, buffer in plain.named_buffers():
        if buffer.is_meta and name in buffers:
            module, _, leaf = name.rpartition(".")
            plain.get_submodule(module).register_buffer(leaf, buffers[name].to("cpu"), persistent=False)
    missing = [name for name, tensor in (*plain.named_parameters(), *plain.named_buffers()) if tensor.is_meta]
    if missing:
        raise ModelError("a weight is not in the model", where=missing[0], found="none of this name",
                         expected=f"all weights of a {type(plain).__name__}",
                         fix="load the model from an unchanged checkpoint")
    replace_long_rope(plain)


class _WithCache(nn.Module):
    """A causal model whose cache comes and goes as tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
                ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=cache, use_cache=True)
        return out.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def _traced(model: nn.Module, config: Any, dtype: torch.dtype) -> Any:
    B, T, P = 2, 3, 4  # any, but no two alike
    heads = (B, config.num_key_value_heads, P, head_size(config))
    names = _cache_names("past_key_values", config)
    arguments = (torch.zeros(B, T, dtype=torch.int64), torch.ones(B, P + T, dtype=torch.int64),
                 torch.arange(P, P + T).expand(B, T).contiguous(), [torch.zeros(heads, dtype=dtype) for _ in names])
    rows = {0: "batch_size", 1: "sequence_length"}
    shapes = {"input_ids": rows, "attention_mask": {0: "batch_size", 1: "total_sequence_length"}, "position_ids": rows,
              "past": [{0: "batch_size", 2: "past_sequence_length"} for _ in names]}
    try:
        with _silent(), torch.no_grad():
            return torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False,
                                     input_names=["input_ids", "attention_mask", "position_ids", *names],
                                     output_names=["logits", *_cache_names("present", config)])
    except torch.onnx.OnnxExporterError as error:
        raise ModelError("torch cannot trace this model", where=type(model).__name__, found=error.__cause__ or error,
                         expected="operations that ONNX has", fix="export to safetensors: save_pretrained_merged"
                         ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of itself: packages that it would have liked, and its own deprecations."""
    talker = logging.getLogger("torch.onnx")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(level)


def _write(program: Any, target: Path, *, external: bool) -> list[Path]:
    """Write beside `target` and rename. Weights get a name that an earlier file does not use, and come first."""
    import onnx_ir

    earlier = _weights_of(target)
    weights = next(name for name in (f"{target.name}.data", f"{target.name}.2.data") if name != earlier)
    with scratch_folder(target) as folder:
        try:
            onnx_ir.save(program.model, folder / target.name, external_data=weights if external else None)
            if external:
                (folder / weights).replace(target.with_name(weights))
            (folder / target.name).replace(target)
        except OSError as error:
            raise OutputError("the ONNX file cannot be written", where=str(target), found=error.strerror or str(error),
                              expected="room for the whole model", fix="make room, or choose another folder") from error
    if earlier:
        target.with_name(earlier).unlink(missing_ok=True)
    return [target, target.with_name(weights)] if external else [target]


def _weights_of(path: Path) -> str | None:
    """The name of the file beside an ONNX file of ours that holds its weights, if one does."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.exists():
        return None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        return None  # something else of this name, which is about to be replaced
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return next((name for name in (f"{path.name}.data", f"{path.name}.2.data") if name in places), None)
