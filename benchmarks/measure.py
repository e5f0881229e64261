"""What the measured processes share: options, clock, token count and result. Imported after Unsloth, where it is used.

Seconds and tokens are taken at the end of each step, when the GPU has finished it. Loading begins when all packages
have been imported; the first step ends when its update is done.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.shapes import GB, Row
from benchmarks.text import rows
from transformers import AutoTokenizer, TrainerCallback

PACKAGES = ("gazelle", "torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "unsloth")
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of a measured process."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("row", help="a name in benchmarks/shapes.py")
    options.add_argument("--model", required=True, help="folder of the checkpoint")
    options.add_argument("--out", type=Path, required=True, help="where to write the result, as JSON")
    options.add_argument("--scratch", required=True, help="folder for what a trainer writes")
    options.add_argument("--quick", action="store_true", help="fewer steps")
    options.add_argument("--tiny", action="store_true", help="a tiny model and rows, to try the benchmark itself")
    return options


def fit(row: Row, *, quick: bool, tiny: bool) -> Row:
    """The row with the steps and sizes that were asked for."""
    return row.tiny() if tiny else row.quick() if quick else row


def training_rows(row: Row, folder: str) -> list[dict[str, list[int]]]:
    """More than enough for all steps. A bin of short rows holds about ten of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = rows(tokenizer, row.workload, row.sequence, (row.steps + 4) * row.batch * (8 if row.packing else 1))
    return [{"input_ids": ids} for ids in pieces]


def settings(row: Row, scratch: str) -> dict[str, Any]:
    """Of the trainer, the same for all."""
    return {"output_dir": scratch, "max_length": row.sequence, "per_device_train_batch_size": row.batch,
            "max_steps": row.steps, "learning_rate": 1e-5, "warmup_steps": 2, "bf16": ON_GPU, "use_cpu": not ON_GPU,
            "optim": "adamw_8bit", "packing": row.packing, "logging_steps": 1, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True}


class Meter(TrainerCallback):
    """Follows a run: `loaded()` when the model is there, `watch(trainer)` before training, `result()` after it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.marks: list[tuple[float, int]] = []
        self.losses: list[float] = []
        self.load = self.load_peak = self.peak = 0.0
        self.started = time.perf_counter()

    def loaded(self) -> None:
        self.load, self.load_peak = now() - self.started, peak()

    def watch(self, trainer: Any) -> None:
        trainer.data_collator = Counted(trainer.data_collator, self)
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.peak = peak()  # afterwards a trainer may bring weights back that lay elsewhere

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append((now(), self.tokens))

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def result(self, row: Row) -> dict[str, Any]:
        """The figures. Batches of one size are worth their median, others their sum."""
        spans = [(after[0] - before[0], after[1] - before[1])
                 for before, after in zip(self.marks[:-1], self.marks[1:], strict=True)][row.warmup - 1 :]
        step = statistics.median(seconds for seconds, _ in spans)
        if row.workload == "dense":
            rate = row.batch * row.sequence / step
        else:
            rate = sum(tokens for _, tokens in spans) / sum(seconds for seconds, _ in spans)
        return {"tokens_per_second": round(rate, 1), "step_s": step, "steps": len(spans), "load_s": round(self.load, 2),
                "first_step_s": round(self.marks[0][0] - self.started, 2), "peak_gb": round(self.peak, 2),
                "load_peak_gb": round(self.load_peak, 2), "predicted_peak_gb": None, "predicted_step_s": None,
                "losses": self.losses, "error": None}


class Counted:
    """A trainer's own collator, whose real tokens are counted."""

    def __init__(self, collator: Any, meter: Meter) -> None:
        self.collator, self.meter = collator, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        batch = self.collator(*args, **options)
        mask = batch.get("attention_mask")
        if "tokens" in batch:
            self.meter.tokens += int(batch["tokens"])
        elif mask is not None and mask.dim() == 2:
            self.meter.tokens += int(mask.sum())
        else:
            self.meter.tokens += batch["input_ids"].numel()
        return batch


def now() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> float:
    """Most GB allocated on the GPU since it was last asked to count anew; on a CPU, resident since the start."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / GB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def give_padding(tokenizer: Any) -> None:
    """Padding must not be what ends a row."""
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = "<|endoftext|>"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    facts = Path("/proc/meminfo")
    memory = int(facts.read_text().split()[1]) / 2**20 if facts.exists() else None
    return {"device": torch.cuda.get_device_name() if ON_GPU else f"cpu ({platform.machine()})",
            "cores": len(os.sched_getaffinity(0)), "memory_gb": memory and round(memory),
            "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {"transformers": transformers.__version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "gazelle" not in found:  # run from its sources
        from gazelle import __version__

        found["gazelle"] = __version__
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result | {"machine": machine(), "versions": versions()}))
