"""From a model's folder and adapters on it to a service."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazelle.adapters.mixed import BASE
from gazelle.base.errors import ModelError, OptionError
from gazelle.base.log import logger
from gazelle.data.profile import Drift, Profile
from gazelle.generate.batcher import Batcher
from gazelle.generate.worker import Worker
from gazelle.models.checkpoint import find_checkpoint
from gazelle.models.load import load_model, load_tokenizer
from gazelle.models.record import read_record
from gazelle.serve.guarding import Guard
from gazelle.serve.metrics import ServerMetrics
from gazelle.serve.prompts import ServedModel
from gazelle.serve.service import Service
from gazelle.serve.settings import Settings

if TYPE_CHECKING:
    from gazelle.guard.checker import SafetyChecker


def load_service(model_name: str, adapters: Mapping[str, str], settings: Settings, *, name: str | None = None,
                 max_context: int | None = None, guard: "SafetyChecker | None" = None, load_in_4bit: bool = False,
                 keys: Iterable[str] = ()) -> Service:
    """Load a model and start the thread that answers.

    Args:
        model_name: folder that training wrote, any checkpoint, hub name or GGUF file. Of an adapter, its base is
            served beside it, under the base's own name.
        adapters: paths of further adapters of the same base, by the names that requests ask for.
        settings: see there.
        name: what requests call the model; default: the last part of its path.
        max_context: tokens of prompt and answer; default: what the model was loaded for.
        guard: checks what is asked and answered.
        load_in_4bit: keep the weights in 4 bits; default: as in training, else as they are stored.
        keys: names of API keys, which metrics count by.

    Raises:
        UserError: a name that is taken, or a model or adapter that cannot be served.
    """
    checkpoint = find_checkpoint(model_name)
    own = name or _called(model_name)
    base = _called(str(checkpoint.adapter["base_model_name_or_path"])) if checkpoint.adapter else None
    for taken in {own, base} & adapters.keys():
        raise OptionError("two models have the same name", where="--adapter", found=taken,
                          expected="a name of its own for each", fix="choose another, or give the model one by --name")
    recorded = "load_in_4bit" in read_record(checkpoint.folder) and checkpoint.adapter is not None
    model, tokenizer = load_model(model_name, load_in_4bit=None if recorded and not load_in_4bit else load_in_4bit,
                                  is_trainable=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batcher = Batcher(model, tokenizer, adapters=adapters, max_running=settings.limits.running,
                      max_context=max_context or model.max_seq_length)
    context = min(batcher.max_context, batcher.cache_tokens)
    started = int(time.time())

    def served(called: str, adapter: str | None, of: Any, folder: Path | None, parent: str | None) -> ServedModel:
        return ServedModel(called, adapter, of, context, started, parent, _drift(folder))

    models = [served(own, None, tokenizer, checkpoint.folder, base)]
    if base is not None and base != own:
        models.append(served(base, BASE, tokenizer, None, None))
    models += [served(called, called, _tokenizer(path, tokenizer), Path(path), base or own)
               for called, path in adapters.items()]
    drifts = {one.name: one.drift for one in models if one.drift is not None}
    metrics = ServerMetrics((one.name for one in models), keys, batcher, drifts)
    return Service({one.name: one for one in models}, Worker(batcher).start(), settings, metrics,
                   Guard(guard, metrics) if guard is not None else None)


def load_guard(path: Path | None) -> "SafetyChecker | None":
    """The guard that a YAML file describes.

    Raises:
        OptionError: no such file, or an option that the guard does not have.
    """
    if path is None:
        return None
    from gazelle.guard.checker import SafetyChecker

    return SafetyChecker.from_config(path)


def _called(path: str) -> str:
    """The last part of a path or hub name; of "." and "..", that of where they lead to."""
    last = Path(path).name
    return (last if last not in ("", "..") else Path(path).resolve().name).removesuffix(".gguf")


def _tokenizer(path: str, of_model: Any) -> Any:
    """An adapter's own tokenizer, which has the template of its training; its tokens have to be the model's."""
    if not (Path(path) / "tokenizer_config.json").exists():
        return of_model
    own, _ = load_tokenizer(path)
    if own.get_vocab() != of_model.get_vocab():
        raise ModelError("the adapter was trained with other tokens", where=path, found=f"{len(own):,} tokens",
                         expected=f"the {len(of_model):,} of the model", fix="serve it by itself")
    return own


def _drift(folder: Path | None) -> Drift | None:
    profile = (read_record(folder).get("run") or {}).get("profile") if folder is not None else None
    if profile is None:
        return None
    try:
        return Drift(Profile.from_dict(profile))
    except ValueError as error:
        logger.warning("%s: %s; drift is not watched", folder, error)
        return None
