"""Loss curves of a real run: gazelle beside Hugging Face + PEFT, the same rows in the same order, the same start.

    python -m benchmarks.curves [--steps 300] [--modes bf16 nf4 fp8] [--out benchmarks/results/curves-DEVICE.json]

SmolLM2-135M learns this Python's own standard library: LoRA of rank 16 on all linear modules, without dropout, 8 rows
of 256 tokens a step. gazelle trains through its SFTTrainer, the other through transformers' Trainer; both have the same
optimizer and schedule. fp8 is compared with Hugging Face in bf16; on a CPU both compute in float32. Beside the JSON
lies a picture.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import statistics
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is here; without a network, asking takes long

import torch
from benchmarks import measure
from benchmarks.step import RESULTS, slug
from benchmarks.text import library_text
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
from gazelle.cli.demo import demo_model
from gazelle.models.checkpoint import find_checkpoint

MODES = ("bf16", "nf4", "fp8") if measure.ON_GPU else ("fp32",)
LAST = 20  # steps whose mean is the final loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="in a batch")
    parser.add_argument("--length", type=int, default=256, help="of a row, in tokens")
    parser.add_argument("--modes", nargs="+", choices=["fp32", "bf16", "nf4", "fp8"], default=list(MODES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/curves-DEVICE.json")
    options = parser.parse_args()

    disable_progress_bar()
    out = options.out or RESULTS / f"curves-{slug(measure.machine()['device'])}.json"
    ids = rows(options.steps * options.rows, options.length)
    curves: dict[str, Any] = {}
    plain: dict[tuple[bool, str], list[float]] = {}
    for mode in options.modes:
        curves[mode] = compare(mode, ids, options.steps, options.rows, plain)
        print(f"{mode}: final loss gazelle {curves[mode]['final']['gazelle']:.4f}, Hugging Face + PEFT "
              f"{curves[mode]['final']['hf']:.4f}, relative difference {curves[mode]['relative_difference']:+.2%}")
    result = {"machine": measure.machine(), "versions": measure.versions(), "date": measure.today(),
              "steps": options.steps, "rows": options.rows, "length": options.length, "modes": curves}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png').name}")


@cache
def checkpoint() -> Path:
    """The demo model's folder, as Hugging Face reads it."""
    return find_checkpoint(str(demo_model())).folder


def rows(count: int, length: int) -> list[list[int]]:
    """Pieces of the standard library, none of them twice, in an order of their own."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    ids = tokenizer(library_text(None), add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
    if count > len(pieces):
        raise SystemExit(f"the text has {len(pieces)} rows, and {count} are asked for: take fewer steps")
    random.Random(0).shuffle(pieces)
    return pieces[:count]


def compare(mode: str, ids: list[list[int]], steps: int, batch: int,
            plain: dict[tuple[bool, str], list[float]]) -> dict[str, Any]:
    """Both curves of a mode, and how far apart they end.

    `plain` holds Hugging Face's curves by what they begin with: that of bf16 serves for fp8 too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        losses = {"gazelle": gazelle_losses(mode, ids, steps, batch, scratch)}
        clear()
        start = Path(scratch, "start", "adapter_model.safetensors").read_bytes()
        key = mode == "nf4", hashlib.sha256(start).hexdigest()
        if key not in plain:
            plain[key] = plain_losses(mode, ids, steps, batch, scratch)
            clear()
        losses["hf"] = plain[key]
    final = {who: statistics.mean(values[-LAST:]) for who, values in losses.items()}
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    return {"losses": losses, "final": final, "relative_difference": final["gazelle"] / final["hf"] - 1,
            "largest_difference": apart}


def clear() -> None:
    gc.collect()
    if measure.ON_GPU:
        torch.cuda.empty_cache()


def dtype_of(mode: str) -> torch.dtype:
    return torch.float32 if mode == "fp32" or not measure.ON_GPU else torch.bfloat16


def settings(mode: str, steps: int, batch: int, scratch: str) -> dict[str, Any]:
    """The same for both. Rows come in the order they have."""
    return {"output_dir": f"{scratch}/run", "per_device_train_batch_size": batch, "max_steps": steps,
            "learning_rate": 2e-4, "warmup_steps": 10, "lr_scheduler_type": "linear", "optim": "adamw_torch",
            "weight_decay": 0.0, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 0,
            "bf16": dtype_of(mode) == torch.bfloat16, "use_cpu": not measure.ON_GPU}


class Losses(TrainerCallback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def gazelle_losses(mode: str, ids: list[list[int]], steps: int, batch: int, scratch: str) -> list[float]:
    """Train, and leave the adapter as it was before in `scratch`/start."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_model()), max_seq_length=len(ids[0]),
                                                         dtype=dtype_of(mode), load_in_4bit=mode == "nf4")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    model.save_pretrained(f"{scratch}/start")
    config = SFTConfig(**settings(mode, steps, batch, scratch), max_length=len(ids[0]), report=False,
                       precision="fp8" if mode == "fp8" else "auto")
    seen = Losses()
    SFTTrainer(model=model, processing_class=tokenizer, args=config, callbacks=[seen],
               train_dataset=[{"input_ids": row} for row in ids]).train()
    return seen.losses


def plain_losses(mode: str, ids: list[list[int]], steps: int, batch: int, scratch: str) -> list[float]:
    """Train the adapter that lies in `scratch`/start, in bf16 where gazelle computes in fp8."""
    dtype = dtype_of(mode)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=dtype, attn_implementation="sdpa",
                                                device_map={"": 0 if measure.ON_GPU else "cpu"},
                                                quantization_config=nf4 if mode == "nf4" else None)
    model = PeftModel.from_pretrained(base, f"{scratch}/start", is_trainable=True)
    seen = Losses()
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=TrainingArguments(**settings(mode, steps, batch, scratch)), callbacks=[seen],
                      train_dataset=data, data_collator=default_data_collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen.losses


def draw(curves: dict[str, Any], path: Path) -> None:
    """One panel a mode."""
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for axes, (mode, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for (who, losses), colour in zip(curve["losses"].items(), ("#c2681f", "#1f6fc2"), strict=True):
            label = "gazelle" if who == "gazelle" else "Hugging Face + PEFT" + (", bf16" if mode == "fp8" else "")
            axes.plot(range(1, len(losses) + 1), losses, color=colour, label=label, linewidth=1,
                      linestyle="-" if who == "gazelle" else ":")
        axes.set_title(f"{mode}, final loss {curve['relative_difference']:+.2%}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("loss, nats a token", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
