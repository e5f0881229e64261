"""Perplexity of the demo model in 4 bits and in fp8, beside plain rounding to the nearest, on rows it was not shown.

    python -m benchmarks.quantised [--rows 64] [--keep FOLDER] [--out benchmarks/results/quantised.json]

It is calibrated with rows of the demo's training data and asked about the demo's test rows, rendered with the chat
template. `--keep` is where checkpoints are left, and found again.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OUT = Path(__file__).parent / "results" / "quantised.json"
METHODS = ("fp8", "awq", "gptq")


def perplexity(model: Any, rows: list[Tensor]) -> float:
    """Of all tokens but the first of each row."""
    loss, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            count += len(row) - 1
    return float(torch.tensor(loss / count).exp())


def nearest(model: Any, group: int, *, symmetric: bool, dtype: torch.dtype) -> Any:
    """A copy whose layers' weights are rounded to the nearest of 4 bits."""
    from gazelle.models.plain import inner_linears
    from gazelle.quantize.groups import Grid, fit, rounded

    copied, grid = copy.deepcopy(model), Grid(group, symmetric, dtype)
    for linear in inner_linears(copied).values():
        linear.weight.data = rounded(linear.weight.data, fit(linear.weight.data, grid), grid)
    return copied


def measure(folder: Path, rows: int, methods: tuple[str, ...] = METHODS, held: int = 80) -> dict[str, Any]:
    """Perplexities by method; checkpoints are written to `folder`, or read from there."""
    from transformers import AutoModelForCausalLM

    import gazelle
    from gazelle.base.machine import machine_facts
    from gazelle.cli.demo import demo_model
    from gazelle.data.calibration import calibration_ids
    from gazelle.export.quantised import save_quantised
    from gazelle.models.load import load_model

    data = Path(gazelle.__file__).parent / "demo"
    model, tokenizer = load_model(str(demo_model()), load_in_4bit=False, dtype="float32")
    model.eval()
    asked = calibration_ids(data / "test.jsonl", tokenizer, rows=held)
    found: dict[str, float] = {"float32": perplexity(model, asked)}
    reports: dict[str, Any] = {}
    for method in methods:
        if not (folder / method).exists():
            save_quantised(model, tokenizer, folder / method, method, calibration=data / "train.jsonl", rows=rows,
                           dtype="float16")
        reports[method] = json.loads((folder / method / "save_report.json").read_text())
        found[method] = perplexity(AutoModelForCausalLM.from_pretrained(folder / method, dtype=torch.float32).eval(),
                                   asked)
        if group := reports[method]["settings"].get("group"):
            kind = "symmetric" if method == "gptq" else "asymmetric"
            found[f"nearest, {kind}"] = perplexity(
                nearest(model, group, symmetric=method == "gptq", dtype=torch.float16), asked)
    return {"machine": machine_facts(), "perplexity": {name: round(value, 3) for name, value in found.items()},
            "tokens": sum(map(len, asked)),
            "exports": {method: {key: report[key] for key in ("settings", "bytes", "worst")}
                        for method, report in reports.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows to calibrate with")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(options.keep or Path(temporary), options.rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result["perplexity"].items():
        print(f"{name:<22}{value:8.3f}")


if __name__ == "__main__":
    main()
