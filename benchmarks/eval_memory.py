"""What evaluation adds to the peak memory of training: the demo model on a CPU, with and without.

    python -m benchmarks.eval_memory [--steps 2] [--only loss generate] [--out benchmarks/results/eval_memory.json]

Each run is a process of its own. "peak" is the largest resident size while `trainer.train()` runs, "taken" what that is
above the size before it: what training, with or without evaluation, takes beside the loaded model. Linux only.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "eval_memory.json"
DEMO = Path(__file__).parent.parent / "src" / "gazelle" / "demo"
KINDS = ("none", "loss", "generate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="evaluation rows, of which so many are answered, too")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", choices=KINDS, help="measure one run in this process, and print it")
    parser.add_argument("--only", choices=KINDS, nargs="+", help="measure these again, and keep the others")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options.steps, options.rows)))
        return
    kept = json.loads(options.out.read_text())["runs"] if options.only and options.out.exists() else {}
    runs = kept | {kind: child(kind, options) for kind in options.only or KINDS}
    for kind in runs.keys() & KINDS[1:] if "none" in runs else ():
        runs[kind]["added"] = {name: round(runs[kind][name] / runs["none"][name] - 1, 4)
                               for name in ("peak_gb", "taken_gb")}
    from gazelle.base.machine import machine_facts

    result = {"model": "SmolLM2-135M-Instruct", "steps": options.steps, "evaluation_rows": options.rows, "runs": runs,
              "machine": machine_facts()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(runs, indent=1))


def child(kind: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "benchmarks.eval_memory", "--one", kind, "--steps", str(options.steps), "--rows",
               str(options.rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(kind: str, steps: int, rows: int) -> dict[str, Any]:
    from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
    from gazelle.base.memory import memory_growth
    from gazelle.cli.demo import demo_model

    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_model()), max_seq_length=512, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16)
    train, test = ([json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
                   for name in ("train", "test"))
    chosen: dict[str, Any] = {} if kind == "none" else {"eval_strategy": "steps", "eval_steps": 1}
    if kind == "generate":
        chosen |= {"eval_generate": ["exact_match", "rougeL", "chrf"], "eval_samples": rows, "eval_max_new_tokens": 16}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=8, report=False,
                         disable_tqdm=True, save_strategy="no", logging_steps=1, **chosen)
        trainer = SFTTrainer(model, args, train, test[:rows], tokenizer)
        gc.collect()
        with memory_growth("cpu") as growth:
            trainer.train()
        metrics = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    last = [entry for entry in map(json.loads, metrics) if "eval_loss" in entry][-1:]
    return {"peak_gb": round(growth.peak / 1e9, 4), "taken_gb": round(growth.bytes / 1e9, 4), "evaluated": last}


if __name__ == "__main__":
    main()
