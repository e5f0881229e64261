"""The formats that `gazelle export` knows, one a row: what may stand behind the colon, and who writes it."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError, OutputError, nearest
from gazelle.base.files import staged_file
from gazelle.base.log import logger

CALIBRATED = ("awq", "gptq")
Write = Callable[[Any, Any, Path, list[str], Any], list[Path]]


@dataclass(frozen=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        ways: what may stand behind the colon; None for GGUF's many, which have a table of their own.
        default: what is taken without a colon.
        write: (model, tokenizer, folder, ways, calibration) to files.
        library: what the hub calls the library that reads it.
        consumer: how `verify` has it read.
        several: whether several ways may be asked for at once; their files share a folder.
    """

    ways: tuple[str, ...] | None
    default: str
    write: Write
    library: str
    consumer: str
    several: bool = False


def usage(name: str) -> str:
    """A format with its ways, such as "merged[:16bit|lora]"."""
    ways = FORMATS[name].ways
    return f"{name}[:METHOD,…]" if ways is None else f"{name}[:{'|'.join(ways)}]" if ways else name


def find_ways(name: str, behind: str, text: str) -> list[str]:
    """The ways named behind the colon of `text`, or the default.

    Raises:
        OptionError: one that the format does not have, or several where it takes one.
    """
    chosen = FORMATS[name]
    wanted = behind or chosen.default
    if chosen.ways is None:
        from gazelle.export.gguf_recipe import find_recipes

        return list(find_recipes(wanted, where="--to"))
    ways = [way.strip().removeprefix("merged_") for way in wanted.split(",")] if wanted else []
    for way in ways:
        if way not in chosen.ways:
            raise OptionError(f"{name} cannot be had in this way", where="--to", found=text, expected=usage(name),
                              fix=nearest(way, chosen.ways) if chosen.ways else f"write --to {name}")
    if len(ways) > 1:
        raise OptionError(f"{name} is written in one way at a time", where="--to", found=text, expected=usage(name),
                          fix=" ".join(f"--to {name}:{way}" for way in ways))
    return ways


def _merged(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:
    from gazelle.facade.saving import save_checkpoint

    way, = ways
    method = f"merged_{way}" if way in ("16bit", "4bit") else way
    options = {"calibration": calibration} if way in CALIBRATED else {}
    report = save_checkpoint(model, tokenizer, folder, method, **options)
    if report.errors:
        logger.info("Farthest from the merged model in float32 is %s, by %.1e of its size.", *report.worst)
    return _files(folder)


def _gguf(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:
    from gazelle.export.gguf import export_gguf

    return export_gguf(model, tokenizer, folder, ways, calibration=calibration)


def _gguf_lora(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:  # noqa: ARG001
    from gazelle.export.gguf_adapter import export_gguf_adapter

    return [export_gguf_adapter(model, tokenizer, folder / "adapter.gguf")]


def _vllm(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:
    from gazelle.export.vllm import export_vllm

    way, = ways
    return export_vllm(model, tokenizer, folder, quantization=None if way == "16bit" else way, calibration=calibration)


def _ollama(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:
    from gazelle.export.ollama import export_ollama

    return export_ollama(model, tokenizer, folder, ways, calibration=calibration)


def _onnx(model: Any, tokenizer: Any, folder: Path, ways: list[str], calibration: Any) -> list[Path]:  # noqa: ARG001
    """The model, and beside it what a runtime for text generation looks for: tokenizer, stop tokens, sizes."""
    import torch

    from gazelle.export.onnx import export_onnx
    from gazelle.models.save import checked_generation, still_tied, write_config

    base = unwrap(model)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        tied = still_tied(model, dict(getattr(base, "all_tied_weights_keys", {})))
        write_config(base, getattr(torch, ways[0]), tied, None, Path(scratch))
        if (generation := checked_generation(base)) is not None:
            generation.save_pretrained(scratch)
        beside = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        places = [folder / path.relative_to(scratch) for path in beside]
        _check_no_model(folder, {path.relative_to(scratch).parts[0] for path in beside})
        files = export_onnx(model, folder / "model.onnx", dtype=ways[0])
        for path, place in zip(beside, places, strict=True):
            place.parent.mkdir(exist_ok=True)
            with staged_file(place) as staging:
                shutil.copyfile(path, staging)
    return files + places


def _check_no_model(folder: Path, names: set[str]) -> None:
    """Raise `OutputError` if files `names` of something else than an earlier ONNX export would be replaced."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    lost = present & (names | {"adapter_config.json"})
    if lost and ("model.onnx" not in present or "adapter_config.json" in lost):
        raise OutputError("the folder holds files of something else, which would be replaced", where=str(folder),
                          found=", ".join(sorted(lost)), expected="a new folder, or one with an earlier ONNX export",
                          fix="choose a folder of its own")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


FORMATS = {
    "merged": Format(("16bit", "4bit", "lora", "fp8", *CALIBRATED), "16bit", _merged, "transformers", "hf"),
    "gguf": Format(None, "q8_0", _gguf, "gguf", "gguf", several=True),
    "gguf-lora": Format((), "", _gguf_lora, "gguf", "gguf-lora"),
    "vllm": Format(("16bit", "fp8", *CALIBRATED), "16bit", _vllm, "vllm", "vllm"),
    "ollama": Format(None, "q8_0", _ollama, "gguf", "gguf", several=True),
    "onnx": Format(("float32", "float16"), "float32", _onnx, "onnx", "onnx"),
}
