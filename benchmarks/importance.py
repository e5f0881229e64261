"""What an importance matrix from the user's own rows does for small GGUF files of the demo model.

    python -m benchmarks.importance [--methods q4_k_m,q3_k_m,q2_k] [--out benchmarks/results/importance.json]

Files are made with and without calibration on the demo's training rows, run in the real llama.cpp on its test rows, and
compared with the model in memory: mean KL divergence a token, share of tokens with the same likeliest one, perplexity.
"""

import argparse
import contextlib
import json
import math
import tempfile
from pathlib import Path

import torch
from benchmarks import measure
from tests.llama import Llama

from gazelle import FastLanguageModel
from gazelle.cli.demo import demo_model
from gazelle.data.calibration import calibration_ids
from gazelle.export.gguf import export_gguf

OUT = Path(__file__).parent / "results" / "importance.json"
DEMO = Path(__file__).parent.parent / "src" / "gazelle" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where files are kept and, if they are there, taken from")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_model()), max_seq_length=512, load_in_4bit=False)
    rows = [row.tolist() for row in calibration_ids(DEMO / "test.jsonl", tokenizer, rows=options.rows)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name, data in (("plain", None), ("weighed", DEMO / "train.jsonl")):
            if not (folder / name).exists():
                export_gguf(model, tokenizer, folder / name, options.methods, calibration=data)
        found = compare(model.eval(), sorted(folder.glob("*/*.gguf"), key=lambda path: (path.name, path.parent)), rows)
    for name, values in found.items():
        print(f"{name:16}" + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))
    result = {"rows": len(rows), "tokens": sum(map(len, rows)), "files": found, "machine": measure.machine(),
              "versions": measure.versions()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(model: torch.nn.Module, paths: list[Path], rows: list[list[int]]) -> dict[str, dict[str, float]]:
    sums = {path: torch.zeros(4, dtype=torch.float64) for path in paths}
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(Llama(path, context=512)) for path in paths}
        for row in rows:
            with torch.no_grad():
                want = model(torch.tensor([row])).logits[0].float().log_softmax(-1)
            for path, llama in opened.items():
                got = torch.from_numpy(llama.logits(row)).log_softmax(-1)
                after = torch.tensor(row[1:])[:, None]
                losses = [-part[:-1].gather(1, after).sum() for part in (got, want)]
                sums[path] += torch.tensor([(want.exp() * (want - got)).sum(),
                                            (want.argmax(-1) == got.argmax(-1)).sum(), *losses])
    tokens = sum(map(len, rows))
    found = {}
    for path, (kl, same, loss, reference) in sums.items():
        after = tokens - len(rows)
        found[f"{path.stem.removeprefix('model-')} {path.parent.name}"] = {
            "bytes": path.stat().st_size, "kl": float(kl / tokens), "same": float(same / tokens),
            "perplexity": math.exp(loss / after), "perplexity_in_memory": math.exp(reference / after)}
    return found


if __name__ == "__main__":
    main()
