"""A training step on the demo's rows, gazelle beside Hugging Face + PEFT, on this machine: what `gazelle bench` does.

    python benchmarks/cpu_step.py [--steps 7] [--rows 8] [--out benchmarks/results/cpu_step.json]
"""

import argparse
import json
from pathlib import Path

from gazelle.cli.bench import measure, show

OUT = Path(__file__).parent / "results" / "cpu_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each, after warm-up steps")
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    result = measure(options.rows, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
