"""Writes the figures of committed result files into the README: python benchmarks/readme.py."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


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


def main() -> None:
    """Replace what stands between the README's markers."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split("<!-- demo:begin -->")
    after = rest.split("<!-- demo:end -->")[1]
    table = demo_table(json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8")))
    readme.write_text(f"{before}<!-- demo:begin -->\n{table}\n<!-- demo:end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
