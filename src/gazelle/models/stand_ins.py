"""Names of the hub that stand for something else while a block lasts: a model or data set on this machine."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gazelle.base.errors import OptionError
from gazelle.base.exchange import exchange
from gazelle.data.parse import PARSERS
from gazelle.models import checkpoint

# What `datasets` calls the reader of a file.
_READERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
            ".txt": "text"}


def check_models(names: Mapping[str, str]) -> None:
    """Raise `OptionError` if there is nothing where a model is said to be; other faults show when it is loaded."""
    for name, path in names.items():
        if not Path(path).expanduser().exists():
            raise OptionError("there is no model to stand in", where=f"--model {name}=…", found=path,
                              expected="a model folder, an adapter's folder or a GGUF file", fix="check the path")


def check_datasets(names: Mapping[str, str]) -> None:
    """Raise `OptionError` if there is no data where a data set is said to be."""
    for name, path in names.items():
        place = Path(path).expanduser()
        if not (place.is_dir() or (place.is_file() and place.suffix.lower() in PARSERS)):
            raise OptionError("there is no data to stand in", where=f"--dataset {name}=…", found=path,
                              expected="a folder, or a file ending in " + ", ".join(PARSERS), fix="check the path")


@contextlib.contextmanager
def models_standing_in(names: Mapping[str, str]) -> Iterator[set[str]]:
    """While it lasts, these models are loaded in place of the hub's, by gazelle and by transformers' classes.

    Args:
        names: hub name -> a folder or GGUF file.

    Yields:
        The names that have been asked for so far.
    """
    used: set[str] = set()
    with contextlib.ExitStack() as stack:
        if names:
            def resolved(name: Any) -> Any:
                if str(name) not in names:
                    return name
                used.add(str(name))
                return str(Path(names[str(name)]).expanduser())

            exchange(stack, checkpoint, "resolve", lambda _: resolved)
            for owner in _loading_classes():
                exchange(stack, owner, "from_pretrained", lambda original: _from_pretrained(original, resolved))
        yield used


def _loading_classes() -> list[Any]:
    """The classes of transformers whose `from_pretrained` others inherit."""
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return [_BaseAutoModelClass, transformers.AutoTokenizer, transformers.AutoConfig, transformers.PreTrainedModel,
            transformers.PreTrainedTokenizerBase, transformers.PreTrainedConfig, transformers.GenerationConfig]


def _from_pretrained(original: Any, resolved: Callable[[Any], Any]) -> classmethod:
    function = original.__func__

    @functools.wraps(function)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and "pretrained_model_name_or_path" not in kwargs:
            return function(cls, **kwargs)  # which says what is missing
        name = args[0] if args else kwargs.pop("pretrained_model_name_or_path")
        if (path := resolved(name)) is not name:
            path = str(checkpoint.find_checkpoint(path).folder)  # a GGUF file is converted as for gazelle itself
        return function(cls, path, *args[1:], **kwargs)

    return classmethod(from_pretrained)


@contextlib.contextmanager
def datasets_standing_in(names: Mapping[str, str]) -> Iterator[set[str]]:
    """While it lasts, `datasets.load_dataset` reads these files and folders in place of the hub's data sets.

    A file is all of whichever split is asked for, and of each where several are joined ("train+test").

    Args:
        names: hub name -> a file or folder.

    Yields:
        The names that have been asked for so far.
    """
    used: set[str] = set()
    with contextlib.ExitStack() as stack:
        if names:
            import datasets

            def around(original: Any) -> Any:
                @functools.wraps(original)
                def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
                    if path not in names:
                        return original(path, *args, **kwargs)
                    used.add(path)
                    return _load(original, Path(names[path]).expanduser(), *args, **kwargs)

                return load_dataset

            exchange(stack, datasets, "load_dataset", around)
        yield used


def _load(original: Any, place: Path, *_: Any, split: Any = None, streaming: bool = False, **__: Any) -> Any:
    """`load_dataset` of a file or folder; the hub's configuration, revision and token mean nothing there."""
    import datasets

    if place.is_dir():
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            saved = datasets.load_from_disk(str(place))
            return saved if split is None or isinstance(saved, datasets.Dataset) else saved[split]
        return original(str(place), split=split, streaming=streaming)
    asked = re.findall(r"(?:^|\+)(\w+)", str(split)) if split is not None else []
    options = {"sep": "\t"} if place.suffix.lower() == ".tsv" else {}
    return original(_READERS[place.suffix.lower()], data_files=dict.fromkeys(asked or ["train"], str(place)),
                    split=split, streaming=streaming, **options)
