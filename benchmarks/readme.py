"""Writes the figures of committed result files into the README: python benchmarks/readme.py."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EVALUATION = "benchmarks/results/evaluation.json"


def demo_table(result: dict[str, Any]) -> str:
    """The demo's scores as Markdown, from what `gazelle demo` writes to scores.json."""
    lines = ["| questions not in training | before | after |", "|---|---|---|"]
    rows = [("one fact, paraphrased", result["paraphrases"]), *(
        (name, {when: result["by_category"][when][name] for when in ("before", "after")})
        for name in result["by_category"]["after"] if name == "multi-step")]
    for name, scores in rows:
        cells = [f"{right / asked:.0%} ({right}/{asked})" for right, asked in (scores["before"], scores["after"])]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    machine, seconds = result["machine"], result["seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "bitsandbytes")
    sentence = (f"Training took {seconds['training']:.0f} s and the whole command {seconds['all']:.0f} s on "
                f"{machine['cores']} CPU cores ({machine['date']}, {versions}; "
                "[all answers](benchmarks/results/demo.json)).")
    return "\n".join([*lines, "", sentence])


PEERS = ("trl", "liger-kernel", "unsloth")  # packages of other libraries
NAMES = {"hf": "TRL + PEFT", "liger": "Liger", "unsloth": "Unsloth", "unsloth-keep": "Unsloth without checkpointing"}


def step_table(result: dict[str, Any], file: str) -> str:
    """Training steps on a GPU as Markdown, from what benchmarks/step.py writes."""
    ours = [entry for entry in result["results"] if entry["who"] == "gazelle" and entry["error"] is None]
    alone = all(entry["who"] == "gazelle" for entry in result["results"])
    heads = [f"{result['machine']['device']}, LoRA r=16 on all linears", "gazelle", "peak memory",
             *([] if alone else ["others"])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for entry in ours:
        others = "; ".join(
            f"{NAMES[other['who']]} {other['tokens_per_second']:,.0f} ({other['peak_gb']:.1f} GiB)"
            for other in result["results"]
            if other["row"] == entry["row"] and other["who"] != "gazelle" and other["error"] is None)
        cells = [entry["label"], f"{entry['tokens_per_second']:,.0f} tokens/s", f"{entry['peak_gb']:.1f} GiB",
                 *([] if alone else [others or "not measured"])]
        lines.append(f"| {' | '.join(cells)} |")
    versions = versions_of({name: version for name, version in result["versions"].items()
                            if not (alone and name in PEERS)})
    sentence = f"Random weights, steady training steps ({result['date']}, {versions}; [all figures]({file}))."
    return "\n".join([*lines, "", sentence])


def cpu_sentence(result: dict[str, Any], file: str) -> str:
    """The demo's training step, from what `gazelle bench` writes."""
    machine, seconds = result["machine"], result["median_seconds"]
    text = (f"A step of the demo ({result['rows_a_batch']} rows, {result['tokens_a_batch']:.0f} tokens) takes "
            f"{seconds['gazelle']:.2f} s, with Hugging Face + PEFT {seconds['hugging face + peft']:.2f} s: "
            f"{result['speedup']:.1f} times as fast")
    memory = result.get("step_memory_gb")
    if memory and None not in memory.values():
        text += f", and it needs {memory['gazelle']:.1f} GiB for it instead of {memory['hugging face + peft']:.1f}"
    device = f"{machine['cores']} CPU cores" if machine["device"].startswith("cpu") else machine["device"]
    return (f"{text} ({device}, {machine['date']}, {versions_of(machine['versions'])}; [all figures]({file})). "
            "`gazelle bench` measures your machine.")


def versions_of(versions: dict[str, str]) -> str:
    shown = ("gazelle", "torch", "transformers", "peft", *PEERS)
    return ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)


def speed_block(folder: Path = ROOT / "benchmarks/results") -> str:
    """What the result files that are there say of speed, as Markdown."""
    parts = [step_table(json.loads(path.read_text(encoding="utf-8")), f"benchmarks/results/{path.name}")
             for path in sorted(folder.glob("step-*.json"))]
    cpu = folder / "cpu_step.json"
    if cpu.exists():
        parts.append(cpu_sentence(json.loads(cpu.read_text(encoding="utf-8")), f"benchmarks/results/{cpu.name}"))
    return "\n\n".join(parts)


SHOWN = {"accuracy": ("right answers", "{:.0%}"), "token_f1": ("words shared with the expected answer, F1", "{:.2f}"),
         "rougeL": ("ROUGE-L", "{:.2f}"), "chrf": ("chrF", "{:.0f}"),
         "perplexity": ("perplexity of the expected answer", "{:.2f}"), "length": ("words an answer", "{:.1f}")}


def evaluation_table(result: dict[str, Any], file: str) -> str:
    """The demo model before and after training as Markdown, from what benchmarks/evaluate_demo.py writes."""
    before, after = (result["models"][name]["overall"] for name in ("before", "after"))
    tests = {one["metric"]: one["p"] for one in result["comparisons"]}
    lines = ["| | before | after | p |", "|---|---|---|---|"]
    for metric, (label, form) in SHOWN.items():
        cells = []
        for one in (before[metric], after[metric]):
            ends = "" if one["low"] is None else f" [{form.format(one['low'])}, {form.format(one['high'])}]"
            cells.append(form.format(one["value"]) + ends)
        p = tests.get(metric)
        cells.append("" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}".rstrip("0"))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    machine, count = result["machine"], len(result["cases"])
    sentence = (f"{count} questions that were not in training, with 95% intervals and paired tests "
                f"({machine['date']}, {versions_of(machine['versions'])}; [all figures and answers]({file})).")
    return "\n".join([*lines, "", sentence])


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of that name."""
    before, rest = text.split(f"<!-- {name}:begin -->")
    after = rest.split(f"<!-- {name}:end -->")[1]
    return f"{before}<!-- {name}:begin -->\n{content}\n<!-- {name}:end -->{after}"


def main() -> None:
    """Replace what stands between the README's markers."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    text = between(between(text, "demo", demo_table(demo)), "bench", speed_block())
    evaluation = json.loads((ROOT / EVALUATION).read_text(encoding="utf-8"))
    text = between(text, "evaluation", evaluation_table(evaluation, EVALUATION))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
