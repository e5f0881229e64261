"""Step time and memory against the share of layers that is made again, of the demo model on this machine.

    python -m benchmarks.checkpoint_ratio [--out benchmarks/results/checkpoint_ratio.json]

Each share is trained in a process of its own, on the same rows; what is made again must not change a loss.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "checkpoint_ratio.json"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(share: float, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step, bytes that a step takes beyond those in use before it, and losses."""
    from transformers import TrainerCallback

    from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
    from gazelle.base.memory import memory_growth
    from gazelle.cli.demo import demo_model
    from gazelle.engine.keep import ALL

    class Steps(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012 — one of it in a process
        memory = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.block = ExitStack()
            self.growth, self.began = self.block.enter_context(memory_growth("cpu")), time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            self.block.close()
            self.memory = max(self.memory, self.growth.bytes or 0)

    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_model()), max_seq_length=length, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    model.gradient_checkpointing_enable(checkpoint_ratio=share)
    data = [{"input_ids": [(31 * at + 7 * row) % 40000 + 100 for at in range(length)]} for row in range(rows * steps)]
    seen = Steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(model, SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=rows,
                                              max_length=length, report=False, disable_tqdm=True, logging_steps=1,
                                              save_strategy="no"), data, None, tokenizer, callbacks=[seen])
        plan = trainer.plan.plan
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"share": share, "layers_made_again": sum(keep == ALL for keep in plan.keeps),
            "seconds": statistics.median(seen.seconds[1:]), "step_gb": seen.memory / 1e9,
            "predicted_peak_gb": plan.peak / 1e9, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    from gazelle.base.machine import machine_facts

    results = []
    for share in SHARES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (share, options.rows, options.length, options.steps)))
        print(json.dumps(results[-1]), flush=True)
    if any(result["losses"] != results[0]["losses"] for result in results):
        raise SystemExit("what is made again changed a loss")
    options.out.write_text(json.dumps({"machine": machine_facts(), "tokens": options.rows * options.length,
                                       "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
