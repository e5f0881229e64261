"""Finds a checkpoint and makes sure that it is whole before anything is loaded from it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import ModelError
from gazelle.models.gguf import convert_gguf

if TYPE_CHECKING:
    import torch

_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.bpe", "*.spm"]
# Second copies of the same weights, also in folders such as checkpoint-500; templates do lie in a folder of their own.
_NOT_WANTED = ["original/*", "consolidated*", "onnx/*", *(f"*/{name}" for name in _WANTED if name != "*.jinja")]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder. `name` is what to write down to find it again; `adapter` is set if it holds no whole model."""

    name: str
    folder: Path
    adapter: dict[str, Any] | None = None


def resolve(model_name: str) -> str:
    """What a name stands for: itself, unless `models.stand_ins` is in force."""
    return model_name


def find_checkpoint(model_name: str, *, revision: str | None = None, token: str | None = None,
                    trust_remote_code: bool = False, cache_dir: str | None = None,
                    local_files_only: bool = False, weights: bool = True) -> Checkpoint:
    """The local folder for a folder, GGUF file or hub name, checked for missing, truncated and pickled weights.

    Without `weights`, they are neither downloaded nor looked at.

    Raises:
        ModelError: nothing is there, or what is there cannot be loaded.
    """
    model_name = resolve(model_name)
    path = Path(model_name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        path = path.resolve()
        return Checkpoint(str(path), convert_gguf(path))
    if path.is_dir():
        path = path.resolve()
        return _checked(str(path), path, weights)
    if path.exists() or path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") > 1 \
            or path.suffix == ".gguf":
        raise ModelError("there is no model at this path", where=model_name,
                         found="a file of another kind" if path.exists() else "nothing",
                         expected="a model folder, a .gguf file, or a hub name such as org/name",
                         fix="check the spelling and the folder you are in")
    patterns = [pattern for pattern in _WANTED if weights or pattern != "*.safetensors"]
    if trust_remote_code:
        patterns.append("*.py")
    folder = _download(model_name, revision, token, patterns, cache_dir, local_files_only)
    return _checked(model_name, folder, weights)


def _download(name: str, revision: str | None, token: str | None, patterns: list[str], cache_dir: str | None,
              local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    problems: dict[type[Exception], tuple[str, str]] = {
        errors.GatedRepoError: ("this model asks for its licence to be accepted first",
                                f"accept it at https://huggingface.co/{name}, then `hf auth login` or token=..."),
        errors.RevisionNotFoundError: ("the model has no such revision", "check revision="),
        errors.RepositoryNotFoundError: ("no model of this name on the hub, or it is private",
                                         "check the spelling; for a private model run `hf auth login` or pass token="),
        errors.HFValidationError: ("no folder of this name here, and it cannot be a hub name",
                                   "check the spelling and the folder you are in"),
        errors.LocalEntryNotFoundError: ("no folder of this name here, no copy in the cache, and no hub to ask",
                                         "check the spelling, or connect (and unset HF_HUB_OFFLINE) to download it"),
        errors.OfflineModeIsEnabled: ("no folder of this name here, and the hub may not be asked",
                                      "unset HF_HUB_OFFLINE to download it"),
        errors.HfHubHTTPError: ("the hub did not deliver the model", "try again; behind a proxy set HTTPS_PROXY"),
    }
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns,
                                      ignore_patterns=_NOT_WANTED, cache_dir=cache_dir,
                                      local_files_only=local_files_only))
    except tuple(problems) as error:
        what, fix = next(problems[kind] for kind in problems if isinstance(error, kind))
        # What huggingface_hub says of a hub it cannot reach is a paragraph that begins in the middle.
        unreached = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
        raise ModelError(what, where=name, found=str(unreached or error),
                         expected="a model folder, a .gguf file, or a hub name such as org/name", fix=fix) from error


def _checked(name: str, folder: Path, weights: bool) -> Checkpoint:
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not _holds_model(folder):
        if weights:
            _check_adapter_weights(folder)
        return Checkpoint(name, folder, read_json(adapter))
    if not (folder / "config.json").exists():
        present = sorted(entry.name for entry in folder.iterdir())
        ggufs = [entry for entry in present if entry.endswith(".gguf")]
        fix = f"pass the file itself: {folder / ggufs[0]}" if ggufs else "choose the folder that holds config.json"
        raise ModelError("this folder is not a model", where=str(folder), found=", ".join(present) or "an empty folder",
                         expected="config.json and *.safetensors, or adapter_config.json", fix=fix)
    read_json(folder / "config.json")
    if weights:
        for shard in weight_files(folder):
            check_safetensors(shard)
    return Checkpoint(name, folder)


def _holds_model(folder: Path) -> bool:
    """Some tools put the base model's config.json beside an adapter; weights tell the two apart."""
    return (folder / "config.json").exists() and any(
        entry.name == "model.safetensors.index.json" or (entry.name.startswith(("model", "pytorch_model"))
        and entry.suffix in (".safetensors", *_PICKLES)) for entry in folder.iterdir())


def _check_adapter_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    if weights.exists():
        check_safetensors(weights)
    elif (folder / "adapter_model.bin").exists():
        raise _pickle_error(folder, ["adapter_model.bin"], "peft")
    else:
        raise ModelError("the adapter's weights are missing", where=str(folder), found="adapter_config.json alone",
                         expected="adapter_model.safetensors beside it", fix="save or copy the adapter again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors shards of a whole model, all of which exist."""
    if (folder / "model.safetensors").exists():  # which transformers reads, even with an index beside it
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            raise _pickle_error(folder, pickles, "transformers")
        raise ModelError("the model's weights are missing", where=str(folder), found="config.json but no weights",
                         expected="model.safetensors, or model.safetensors.index.json and its shards",
                         fix="download or copy the weights; a repository with pickled weights alone cannot be used")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index of the shards is damaged", where=str(index), found="no weight_map",
                         expected="a table from tensor to file", fix="download or copy the file again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError("a part of the model is missing", where=str(folder), found=f"no {', '.join(missing)}",
                         expected=f"all {len(names)} files named in {index.name}", fix="download or copy it again")
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Raise `ModelError` unless the file is exactly as long as its own header says."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError("the weights file is damaged or cut off", where=str(path), found=f"{size:,} bytes",
                             expected=f"at least {8 + length:,} bytes", fix="download or copy it again")
    try:
        with safe_open(path, framework="numpy"):  # reads the header alone, and checks all of it
            pass
    except SafetensorError as error:
        raise ModelError("the weights file is damaged or cut off" if "incomplete" in str(error) else
                         "the weights file has a damaged header", where=str(path), found=str(error),
                         expected=f"a safetensors file, {size:,} bytes of which its header accounts for",
                         fix="download or copy it again") from error


def check_finite(tensors: "Iterable[tuple[str, torch.Tensor]]", where: str) -> None:
    """Raise `ModelError` for the first floating-point tensor that holds NaN or infinity. One pass over the memory."""
    import torch

    for name, tensor in tensors:
        if tensor.is_meta:  # kept on disk or elsewhere: nothing here to look at
            continue
        # The sum alone tells, at memory speed; only a sum that overflowed needs the slow look.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.sum(dtype=torch.float32).isfinite():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ModelError("the weights hold values that are not numbers", where=f"{where}, {name}",
                                 found=f"{bad:,} of {tensor.numel():,} values are NaN or infinite",
                                 expected="finite values", fix="use an earlier checkpoint: this one diverged")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ModelError` if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("the file is not JSON", where=str(path), found=str(error), expected="a JSON object",
                         fix="download or copy it again") from error
    if not isinstance(value, dict):
        raise ModelError("the file holds no JSON object", where=str(path), found=type(value).__name__,
                         expected="a JSON object", fix="download or copy it again")
    return value


def _pickle_error(folder: Path, names: list[str], library: str) -> ModelError:
    load = "AutoModelForCausalLM" if library == "transformers" else "AutoPeftModelForCausalLM"
    return ModelError("the weights are pickled, and loading a pickle can run code", where=str(folder),
                      found=", ".join(names), expected="*.safetensors",
                      fix=f"if you trust it: {library}.{load}.from_pretrained(folder).save_pretrained(new_folder)")
