"""`gazelle bench`: a training step on this machine, gazelle beside Hugging Face + PEFT, on the demo's rows; or, of a
model that is named, prefill, decoding and a training step by length and batch size.

Both of the two train the same LoRA on the same rows of the same model with an optimizer of their own. Hugging Face +
PEFT is the plain script: padded batches, the model's own loss over all positions. Steps alternate between the two, so
that whatever else the machine does falls on both; the figure is the median.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gazelle.base.device import default_device
from gazelle.base.errors import OptionError, OutputError
from gazelle.base.files import check_writable, write_text
from gazelle.base.log import log_to_terminal
from gazelle.base.machine import machine_facts
from gazelle.base.memory import memory_growth
from gazelle.cli.demo import PACKAGE, demo_model
from gazelle.data.encode import Example, encode
from gazelle.data.load import load_conversations
from gazelle.engine.graph import MOST_SHAPES, WARM_UP
from gazelle.evaluate.benchmark import benchmark
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models import options
from gazelle.models.packed import packed_attention_on
from gazelle.models.swap import accelerate
from gazelle.train.config import SFTConfig
from gazelle.train.dataset import Collator, moved
from gazelle.train.loss import batch_loss
from gazelle.train.step import GraphedStep, refuses_graph

OURS, THEIRS = "gazelle", "hugging face + peft"
LENGTH = 512
NEW_TOKENS = 16


class Side:
    """One of the two: a model with its optimizer, and a loss with its gradients.

    Args:
        model: with an adapter.
        loss: from the rows of a batch to their mean loss, whose gradients it adds.
    """

    def __init__(self, model: Any, loss: Callable[[list[Example]], Tensor]) -> None:
        self.model, self.loss = model, loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)  # a recorded step adds gradients where they lay
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, rows: list[Example]) -> Tensor:
        """Forward, backward, update. Returns the loss."""
        loss = self.loss(rows)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()


def bench_command(rows: int, steps: int, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the result where that is asked for."""
    log_to_terminal()
    if out is not None:
        check_writable(out.parent)
        if out.is_dir():
            raise OutputError("the result is one file", where=f"--out {out}", found="a folder", expected="a JSON file",
                              fix=f"write --out {out / 'bench.json'}")
    result = measure(rows, steps)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(result))
        return
    show(result)


def bench_model(
    model_name: str, lengths: str, batches: str, *, dtype: str | None, warmup: int, iterations: int, train: bool,
    load_in_4bit: bool, out: Path | None, as_json: bool,
) -> None:
    """Measure a model with a LoRA adapter on the engine, print the table, and write it where that is asked for."""
    log_to_terminal()
    seq_lengths, batch_sizes = numbers(lengths, "--lengths"), numbers(batches, "--batches")
    if dtype is not None:
        options.dtype(dtype)  # a name that is none is told of before the model is loaded
    if out is not None:
        check_writable(out.parent)
        if out.suffix not in (".json", ".csv", ".md", ".png") or out.is_dir():
            raise OutputError("the suffix says what the result is written as", where=f"--out {out}",
                              found=out.suffix or "none", expected=".json, .csv, .md or .png", fix="choose one of them")
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, load_in_4bit=load_in_4bit,
                                                         max_seq_length=max(seq_lengths) + NEW_TOKENS)
    if train:
        model = model if hasattr(model, "peft_config") else FastLanguageModel.get_peft_model(model)
        accelerate(model)
    report = benchmark(model, tokenizer, seq_lengths, batch_sizes, dtype, warmup, iterations, new_tokens=NEW_TOKENS,
                       train=train)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            report.plot(out)
        else:
            text = {".json": report.to_json, ".csv": report.to_csv, ".md": report.to_markdown}[out.suffix]()
            write_text(out, text)
    typer.echo(report.to_json() if as_json else report.to_markdown(), nl=False)


def numbers(text: str, option: str) -> list[int]:
    """The whole numbers of "256,512", from 1 on."""
    try:
        found = [int(part) for part in text.split(",")]
        if min(found) < 1:
            raise ValueError(text)
        return found
    except ValueError as error:
        raise OptionError("these are no numbers from 1 on", where=option, found=text, expected="such as 256,512",
                          fix="write whole numbers with commas between") from error


def measure(rows: int = 8, steps: int = 7) -> dict[str, Any]:
    """The figures of this machine.

    Args:
        rows: in a batch.
        steps: measured of each side, after warm-up steps.

    Returns:
        JSON-able: the machine, and by side median seconds, tokens/s and the memory a step takes beyond the weights.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_model()), max_seq_length=LENGTH, load_in_4bit=False)
    plain = FastLanguageModel.get_peft_model(copy.deepcopy(model)).train()
    ours = FastLanguageModel.get_peft_model(model).train()
    batches = make_batches(tokenizer, rows, steps)
    sides = {OURS: our_side(ours, tokenizer, rows), THEIRS: their_side(plain, tokenizer)}
    gpu = default_device().startswith("cuda")
    # Until every shape's step has been recorded. For a CPU, the two steps that memory is measured by are enough.
    warm_up = len(batches) * (WARM_UP + 1) if gpu else 0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    with packed_attention_on(ours):
        for side in sides.values():
            side.step(batches[0])  # makes the optimizer's state as well
        memory = {name: step_memory(side, batches[0]) for name, side in sides.items()}
        for number in range(warm_up + steps):
            batch = batches[number % len(batches)]
            for name, side in sides.items():
                began = now()
                loss = side.step(batch)
                if number >= warm_up:
                    seconds[name].append(now() - began)
                losses[name].append(loss.item())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    used = [batches[number % len(batches)] for number in range(warm_up, warm_up + steps)]
    tokens = statistics.mean(sum(len(row.input_ids) for row in batch) for batch in used)
    return {
        "machine": machine_facts(),
        "rows_a_batch": rows, "tokens_a_batch": tokens, "steps": steps,
        "median_seconds": medians, "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "step_memory_gb": {name: size and size / 2**30 for name, size in memory.items()},
        "speedup": medians[THEIRS] / medians[OURS],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "all_seconds": seconds,
    }


def make_batches(tokenizer: Any, rows: int, steps: int) -> list[list[Example]]:
    """Batches of the demo's training rows in an order of their own: one a step, but no more than can be recorded."""
    loaded = load_conversations(PACKAGE / "demo" / "train.jsonl")
    examples = encode(loaded.conversations, tokenizer, max_length=LENGTH).examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(steps, MOST_SHAPES)
    return [[examples[order[at % len(order)]] for at in range(start * rows, (start + 1) * rows)]
            for start in range(count)]


def our_side(model: Any, tokenizer: Any, rows: int) -> Side:
    """Packed batches through the engine, recorded as CUDA graphs where the trainer would do so."""
    accelerate(model)
    config = SFTConfig(output_dir=None, per_device_train_batch_size=rows, max_length=LENGTH)
    graphed = refuses_graph(config, model, packed=True, processes=1) is None
    collate = Collator(True, tokenizer.pad_token_id, round_up=graphed)
    recorded = GraphedStep(model, 0.0) if graphed else None

    def loss_of(batch: list[Example]) -> Tensor:
        inputs = moved(collate([{"rows": batch}]), model.device)
        count = (inputs["labels"] != -100).sum()
        if recorded is not None:
            return recorded(inputs, count)
        total, _ = batch_loss(model, inputs)
        loss = total / count
        loss.backward()
        return loss

    return Side(model, loss_of)


def their_side(model: Any, tokenizer: Any) -> Side:
    """Padded batches through the model as Hugging Face and PEFT made it; on a GPU under autocast, as Trainer does."""
    collate = Collator(False, tokenizer.pad_token_id)
    mixed = model.device.type == "cuda"

    def loss_of(batch: list[Example]) -> Tensor:
        inputs = moved(collate([{"rows": batch}]), model.device)
        with torch.autocast("cuda", model.dtype) if mixed else nullcontext():
            loss: Tensor = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss

    return Side(model, loss_of)


def now() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_memory(side: Side, batch: list[Example]) -> int | None:
    """Most bytes in use during a step beyond those in use before it; None where the system does not tell."""
    with memory_growth(default_device()) as growth:
        side.step(batch)
    return growth.bytes


def show(result: dict[str, Any]) -> None:
    """The table in the terminal."""
    console = Console()
    machine = result["machine"]
    table = Table(title=f"A training step of SmolLM2-135M, LoRA, {result['rows_a_batch']} rows, "
                        f"{result['tokens_a_batch']:.0f} tokens")
    for column in ("", "seconds", "tokens/s", "memory of a step"):
        table.add_column(column, justify="left" if not column else "right")
    for name, median in result["median_seconds"].items():
        memory = result["step_memory_gb"][name]
        table.add_row(name, f"{median:.3f}", f"{result['tokens_per_second'][name]:,.0f}",
                      "–" if memory is None else f"{memory:.2f} GiB")
    console.print(table)
    console.print(f"{result['speedup']:.2f} times as fast on {machine['device']}; largest difference of a loss "
                  f"{result['largest_loss_difference']:.1e}", highlight=False, soft_wrap=True)
