"""Exporting a folder, a hub name or a file to several formats, and verifying what was written."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gazelle.base.errors import OptionError, nearest
from gazelle.base.files import check_writable
from gazelle.base.progress import tell
from gazelle.facade.formats import CALIBRATED, FORMATS, find_ways, usage
from gazelle.models.card import write_card
from gazelle.models.checkpoint import find_checkpoint
from gazelle.models.load import load_model
from gazelle.models.record import read_record

if TYPE_CHECKING:
    from gazelle.export.verify import Verification


@dataclass(frozen=True)
class Target:
    """One format to export to, its ways, and where to. `label` is the whole as the user may type it."""

    name: str
    ways: list[str]
    folder: Path

    @property
    def label(self) -> str:
        """Such as "gguf:q4_k_m,q8_0"."""
        return f"{self.name}:{','.join(self.ways)}" if self.ways else self.name


@dataclass(frozen=True)
class Exported:
    """What came of one target: its files, how long they took, and the verification of each export in it."""

    target: Target
    files: list[Path]
    seconds: float
    verified: "list[Verification]"


def parse_targets(model_name: str, to: list[str], output: Path | None = None) -> list[Target]:
    """What `--to` asks for, each once, with a folder for each: MODEL-gguf and the like beside the model.

    Args:
        model_name: folder, hub name or GGUF file; a hub name is exported to the current folder.
        to: texts such as "gguf:q4_k_m,q8_0".
        output: the folder, or with several targets the one in which each gets its own.

    Raises:
        OptionError: an unknown format or way.
        OutputError: a folder that cannot be written to.
    """
    targets: dict[str, Target] = {}
    for text in dict.fromkeys(to):
        name, _, behind = text.strip().lower().partition(":")
        if (name := name.strip()) not in FORMATS:
            raise OptionError("there is no such format to export to", where="--to", found=text,
                              expected=", ".join(map(usage, FORMATS)), fix=nearest(name, FORMATS))
        ways = find_ways(name, behind, text)
        suffix = name if FORMATS[name].several or ways == find_ways(name, "", text) else f"{name}-{ways[0]}"
        earlier = targets.get(suffix)
        targets[suffix] = Target(name, list(dict.fromkeys([*(earlier.ways if earlier else ()), *ways])), Path(suffix))
    path = Path(model_name).expanduser()
    local = Path(path.name).absolute()
    if path.exists():  # beside a link, not beside what it leads to
        local = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    found = []
    for suffix, target in targets.items():
        folder = local.with_name(f"{local.name.removesuffix('.gguf')}-{suffix}")
        if output is not None:
            folder = output / suffix if len(targets) > 1 else output
        check_writable(folder.absolute())
        found.append(Target(target.name, target.ways, folder))
    return found


def export_checkpoint(model_name: str, to: list[str], output: Path | None = None, *, data: str | None = None,
                      verify: bool = False, llama: str | None = None, vllm: str | None = None) -> Iterator[Exported]:
    """Write a model in other formats, one after another.

    A model that lies in its files as it is to be read is mapped from there instead of being loaded. An adapter goes
    onto its base as that was kept in training.

    Args:
        model_name: folder with an adapter or a model, hub name or GGUF file.
        to, output: as in `parse_targets`.
        data: rows to verify with and to calibrate on. Left out: those of the run, if the folder says where they are.
        verify: ask each export, in the program that reads it, what the model in memory is asked.
        llama: where llama.cpp is, if not on the PATH.
        vllm: a Python with vLLM.

    Yields:
        What came of each target, as it is done.

    Raises:
        UserError: before the model is loaded, for options, data and folders that cannot be used.
    """
    targets = parse_targets(model_name, to, output)
    for option, given in (("--llama", llama), ("--vllm", vllm)):
        if given is not None and not verify:
            raise OptionError("it is for verifying, which is not asked for", where=option, found=given,
                              expected=f"--verify with {option}", fix=f"add --verify, or leave {option} out")
    if verify:
        from gazelle.export.consumers.llama import find_library

        find_library(llama)
        if vllm is not None and shutil.which(vllm) is None:
            raise OptionError("there is no such program", where="--vllm", found=vllm, expected="a Python that has vLLM",
                              fix="name the python in the environment in which vLLM is installed")
    checkpoint = find_checkpoint(model_name)
    rows = None
    if data is not None or verify or any(way in CALIBRATED for target in targets for way in target.ways):
        from gazelle.facade.rows import find_rows

        rows = find_rows(checkpoint.folder, data)
    recorded = checkpoint.adapter is not None and "load_in_4bit" in read_record(checkpoint.folder)
    tell("loading the model")
    model, tokenizer = load_model(model_name, load_in_4bit=None if recorded else False, dtype="auto",
                                  device_map="cpu", is_trainable=False)
    asked = None
    if verify:
        from gazelle.facade.verifying import Verifier

        asked = Verifier(model, tokenizer, rows, llama=llama, vllm=vllm)
    for target in targets:
        began = time.perf_counter()
        tell(f"writing {target.label}")
        chosen = FORMATS[target.name]
        # An importance matrix for GGUF takes time, so that it is made of rows that the user names alone.
        calibration = rows if data is not None or not chosen.several else None
        files = chosen.write(model, tokenizer, target.folder, target.ways, calibration)
        library = "peft" if target.ways == ["lora"] else chosen.library
        write_card(target.folder, model, library=library, files=files, run_folder=checkpoint.folder)
        seconds = time.perf_counter() - began
        verified = asked.check(target.folder, target.ways, files, chosen.consumer) if asked else []
        yield Exported(target, files, seconds, verified)
