"""Models to evaluate, from what people type: a folder, a hub name, a GGUF file, an address."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gazelle.base.errors import ModelError, OptionError
from gazelle.base.log import logger
from gazelle.evaluate.answerers import Answerer, LocalModel, Reply, labelled, prompt_ids
from gazelle.evaluate.cases import Case
from gazelle.evaluate.endpoint import Endpoint
from gazelle.export.consumers.llama import find_library
from gazelle.export.verify import ConsumerError, run_consumer
from gazelle.models.load import load_tokenizer


class LlamaModel(Answerer):
    """A GGUF file in the real llama.cpp, in a process of its own.

    Args:
        path: the file. Its own tokenizer and chat template make the prompts.
        library: llama.cpp's library, as `find_library` finds it.
    """

    def __init__(self, path: str | Path, library: Path) -> None:
        self._path, self._library = Path(path), library
        self._tokenizer: Any = None
        if not self._path.is_file():
            raise ModelError("there is no such file", where=str(path), found="nothing", expected="a GGUF file",
                             fix="check the path")

    def open(self) -> None:
        self._tokenizer, _ = load_tokenizer(str(self._path))
        self.runs_on = f"llama.cpp ({self._library}), {torch.get_num_threads()} threads"

    def ask(self, cases: Sequence[Case], max_new_tokens: int, timed: Sequence[int] = ()) -> list[Reply]:
        prompts = [prompt_ids(self._tokenizer, case) for case in cases]
        # The first of all pays for reading the file: it is asked once more, and that is counted.
        given = self._run(prompts=[*prompts[:1], *prompts], tokens=max_new_tokens)
        self.memory = given["memory"]
        replies = []
        for number, (ids, seconds) in enumerate(list(zip(given["answers"], given["seconds"], strict=True))[1:]):
            said = ids[:-1] if ids and ids[-1] in given["ends"] else ids
            text = self._tokenizer.decode(said, skip_special_tokens=True)
            replies.append(Reply(text, seconds[0], seconds[1], len(said)) if number in timed else Reply(text))
        return replies

    def surprise(self, cases: Sequence[Case]) -> list[tuple[float, int]] | None:
        rows = []
        for case in cases:
            ids, labels = labelled(self._tokenizer, case)
            rows.append({"ids": ids, "at": [at - 1 for at, label in enumerate(labels) if label >= 0]})
        given = self._run(rows=rows)
        return [(-sum(row), len(row)) for row in given["logprobs"]]

    def _run(self, **asked: Any) -> dict[str, Any]:
        request = {"path": str(self._path), "library": str(self._library), "texts": [], "chats": [], "prompts": [],
                   "tokens": 1, "stops": None, "rows": [], "kept": 0, "threads": torch.get_num_threads()} | asked
        try:
            return run_consumer([sys.executable, "-m", "gazelle.export.consumers", "llama"], request)[0]
        except ConsumerError as error:
            raise ModelError("llama.cpp did not answer", where=str(self._path), found=str(error),
                             expected="a file that this llama.cpp reads", fix="try a newer llama.cpp") from error


def find_model(place: str, *, llama: str | None = None, load_in_4bit: bool | None = None, batch_size: int = 16,
               key_variable: str | None = None) -> Answerer:
    """What asks the model at `place`.

    Args:
        place: a folder, a hub name, a GGUF file, or an address such as http://127.0.0.1:8000/v1#name.
        llama: folder of llama.cpp, for GGUF files; left out, what is installed. Without any, gazelle reads the file.
        load_in_4bit, batch_size: as in `LocalModel`.
        key_variable: as in `Endpoint`.

    Raises:
        OptionError: an address that is none, or a file that is not there.
    """
    if place.startswith(("http://", "https://")):
        return Endpoint(place, key_variable=key_variable)
    if place.endswith(".gguf"):
        library = find_library(llama)
        if library is not None:
            return LlamaModel(place, library)
        logger.info("%s is read by gazelle: no llama.cpp is installed or named by --llama", place)
    if place.startswith((".", "/", "~")) and not Path(place).expanduser().exists():
        raise OptionError("there is no such model", where="model", found=place,
                          expected="a folder, a hub name, a GGUF file or an address", fix="check the path")
    return LocalModel(place, batch_size=batch_size, load_in_4bit=load_in_4bit)


def named_models(given: Sequence[str]) -> dict[str, str]:
    """NAME=PLACE or PLACE of each model; a place alone is named by its last part.

    Raises:
        OptionError: two of one name, or a name without a place.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, place = one.partition("=")
        if not equals or "/" in name or not name:  # an address may hold a "=", and so may a folder
            name, place = _short(one), one
        if not place or name in found:
            raise OptionError("two models have one name" if place else "a model has no place", where="MODEL", found=one,
                              expected="NAME=PLACE, such as tuned=out/lora", fix="give it a name of its own")
        found[name] = place
    return found


def _short(place: str) -> str:
    if place.startswith(("http://", "https://")):
        return place.rpartition("#")[2] if "#" in place else place
    return Path(place).name or place
