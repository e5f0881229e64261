"""Exports killed at random moments: what is there afterwards is the earlier export or the new one, never a part.

    python -m benchmarks.kill --runs 500 --out benchmarks/results/kill.json

Each run is a process forked from one in which everything is imported, so that most of its time is spent writing. It
exports a small model over an earlier export of another one, in two formats, and gets SIGKILL after a time drawn between
nothing and a little more than it needs. Every file is then compared with both exports, byte for byte; a last run that
nobody kills must leave nothing but the new export.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

Files = dict[str, bytes]


def small_model(seed: int) -> Any:
    """A random Llama of 3 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def small_tokenizer() -> Any:
    """A byte-level tokenizer that fits it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """What `gazelle export --to merged --to gguf:f16,q8_0` writes, card included."""
    from gazelle.export.gguf import export_gguf
    from gazelle.models.card import write_card
    from gazelle.models.save import save_merged

    save_merged(model, tokenizer, folder / "merged", max_shard_size="1MB")
    files = export_gguf(model, tokenizer, folder / "gguf", "f16,q8_0")
    write_card(folder / "gguf", model, library="gguf", files=files)


def read(folder: Path) -> Files:
    """Every file below a folder, but for how long it took to save."""
    return {str(path.relative_to(folder)): re.sub(rb'"seconds": [\d.]+', b"", path.read_bytes())
            if path.name == "save_report.json" else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def seconds_of(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def judge(found: Files, old: Files, new: Files) -> str:
    """"old", "new" or "both" (GGUF files are replaced one by one, a folder of safetensors at once).

    Raises:
        AssertionError: a file that is neither, or a merged folder of two halves.
    """
    shown = {name: data for name, data in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    assert shown.keys() >= old.keys(), sorted(old.keys() - shown.keys())
    for name, data in shown.items():
        assert data in (old.get(name), new.get(name)), f"{name} is of neither export"
    merged = [{name: data for name, data in files.items() if name.startswith("merged/")} for files in (shown, old, new)]
    assert merged[0] in merged[1:], "the merged folder is made of both exports"
    return "new" if shown == new else "old" if shown == old else "both"


def kill_runs(runs: int, seed: int = 0) -> dict[str, Any]:
    """Kill `runs` exports; how many left what. Raises AssertionError at the first that left a part of one."""
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    tokenizer, chance = small_tokenizer(), random.Random(seed)
    models = [small_model(1), small_model(2)]
    left, clutter = Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("old", "new", "now")}
        for name, model in zip(("old", "new"), models, strict=True):
            folders[name].mkdir()
            export(model, tokenizer, folders[name])
        old, new = read(folders["old"]), read(folders["new"])
        now = folders["now"]
        shutil.copytree(folders["old"], now)
        needed = seconds_of(lambda: export(models[0], tokenizer, now))
        for _ in range(runs):
            if read(now) != old:  # leftovers of killed runs stay: the next run has to deal with them
                for name in ("merged", "gguf"):
                    shutil.rmtree(now / name, ignore_errors=True)
                    shutil.copytree(folders["old"] / name, now / name)
            child = os.fork()
            if child == 0:
                try:
                    export(models[1], tokenizer, now)
                finally:
                    os._exit(0)
            time.sleep(chance.uniform(0, 1.1 * needed))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = read(now)
            left[judge(found, old, new)] += 1
            clutter += any(part.startswith(".") for name in found for part in Path(name).parts)
        export(models[1], tokenizer, now)
        assert read(now) == new, "a whole run after killed ones leaves something else than its export"
    return {"runs": runs, "left": dict(left), "left_temporaries": clutter, "seconds_of_one": round(needed, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from gazelle.base.machine import machine_facts

    result = {"machine": machine_facts()} | kill_runs(arguments.runs)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
