"""What `gazelle recommend` proposes for the demo's rows and model, trained, and asked the demo's questions.

    python -m benchmarks.recommend [--out benchmarks/results/recommend.json]

The recipe is written to a file and taken as `gazelle train` takes it. Beside the score stand the proposal, the run's
curves and what the advisor said of them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from gazelle.base.machine import machine_facts
from gazelle.cli.demo import PACKAGE, accuracy_by_category, demo_model, grade
from gazelle.evaluate.cases import read_cases
from gazelle.facade.recommending import recommend, write_recipe
from gazelle.facade.run import run
from gazelle.train.metrics import read_metrics
from gazelle.train.recipe import load_recipe

RESULTS = Path(__file__).parent / "results"
CURVES = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "train_runtime")


def measure(folder: Path) -> dict[str, Any]:
    """All figures."""
    found = recommend(str(PACKAGE / "demo" / "train.jsonl"), str(demo_model()))
    write_recipe(found, folder / "recipe.yaml")
    trainer = run(load_recipe(folder / "recipe.yaml", [f"output_dir={folder / 'out'}"]))
    cases = read_cases(PACKAGE / "demo" / "test.jsonl")
    graded = grade("as recommended", trainer.model, trainer.processing_class, cases)
    shipped = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["by_category"]["after"]
    return {
        "machine": machine_facts(), "questions": len(graded),
        "right": sum(item.right for item in graded), "right_shipped": sum(right for right, _ in shipped.values()),
        "by_category": accuracy_by_category(graded), "by_category_shipped": shipped,
        "proposed": [{"option": f"{item.section}.{item.option}", "value": item.value, "reason": item.reason}
                     for item in found.choices if item.option not in ("name", "train")],
        "advice": [finding.line() for finding in trainer._advisor.findings],
        "metrics": [{name: entry[name] for name in CURVES if name in entry}
                    for entry in read_metrics(folder / "out" / "metrics.jsonl")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    print(json.dumps({name: result[name] for name in ("right", "right_shipped", "questions", "advice")}))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
