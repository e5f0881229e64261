"""A training step on the demo's rows, gazelle beside Hugging Face + PEFT, on this machine.

    python benchmarks/cpu_step.py [--steps 7] [--rows 8] [--out benchmarks/results/cpu_step.json]

Both train the same LoRA on the same rows of the same model with the same optimizer. Hugging Face + PEFT is the plain
script: padded batches, the model's own loss over all positions. Steps alternate between the two, so that whatever else
the machine does falls on both; the figure is the median.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from gazelle.base.machine import machine_facts
from gazelle.cli.demo import PACKAGE, demo_model
from gazelle.data.encode import Example, encode
from gazelle.data.load import load_conversations
from gazelle.models.load import load_model
from gazelle.models.packed import packed_attention_on
from gazelle.train.dataset import Collator
from gazelle.train.loss import batch_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each, after two warm-up steps")
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_step.json"))
    options = parser.parse_args()

    model, tokenizer = load_model(str(demo_model()), max_seq_length=512, load_in_4bit=False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loaded = load_conversations(PACKAGE / "demo" / "train.jsonl")
    rows = encode(loaded.conversations, tokenizer, max_length=512).examples
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()
    batches = [[rows[i] for i in order[start : start + options.rows]]
               for start in range(0, (options.steps + 2) * options.rows, options.rows)]

    packed, padded = Collator(None), Collator(tokenizer.pad_token_id)
    seconds: dict[str, list[float]] = {"gazelle": [], "hugging face + peft": []}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    for number, batch in enumerate(batches):
        for name in seconds:
            began = time.perf_counter()
            loss = gazelle_loss(model, packed, batch) if name == "gazelle" else plain_loss(model, padded, batch)
            loss.backward()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
            losses[name].append(loss.item())
            if name != "gazelle":  # one update for both, so that both stay on the same weights
                optimizer.step()
            optimizer.zero_grad()

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = statistics.mean(sum(len(row.input_ids) for row in batch) for batch in batches[2:])
    result = {
        "machine": machine_facts(),
        "rows_a_batch": options.rows, "tokens_a_batch": tokens, "steps": options.steps,
        "median_seconds": medians, "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "speedup": medians["hugging face + peft"] / medians["gazelle"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "all_seconds": seconds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in medians.items():
        print(f"{name:<22}{value:6.2f} s a step {tokens / value:8.0f} tokens/s")
    print(f"speed-up {result['speedup']:.2f}×, largest difference of a loss {result['largest_loss_difference']:.1e}")


def gazelle_loss(model: Any, collate: Collator, batch: list[Example]) -> torch.Tensor:
    """Mean loss of a packed batch."""
    inputs = collate([batch])
    with packed_attention_on(model):
        total, _ = batch_loss(model, inputs)
    return total / (inputs["labels"] != -100).sum()


def plain_loss(model: Any, collate: Collator, batch: list[Example]) -> torch.Tensor:
    """Mean loss of a padded batch, by the model itself."""
    return model(**collate([batch]), use_cache=False).loss


if __name__ == "__main__":
    main()
