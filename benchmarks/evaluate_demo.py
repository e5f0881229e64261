"""The demo model before and after training, on the demo's test questions, by `EvaluationPipeline`.

    python -m benchmarks.evaluate_demo out/demo [--out benchmarks/results/evaluation.json] [--report FOLDER]

`out/demo` is what `gazelle demo` wrote.
"""

import argparse
import json
from pathlib import Path

from gazelle.base.log import log_to_terminal
from gazelle.cli.demo import PACKAGE, demo_model
from gazelle.evaluate.pipeline import EvaluationPipeline

OUT = Path(__file__).parent / "results" / "evaluation.json"
QUALITY = ("accuracy", "key_coverage", "token_f1", "rougeL", "bleu", "chrf", "perplexity", "length", "distinct_2")
TIMES = ("first_token", "latency", "tokens_per_second", "peak_memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", type=Path, help="folder for the report, too")
    parser.add_argument("--times", action="store_true", help="measure speed and memory, too: on a quiet machine")
    options = parser.parse_args()
    log_to_terminal()
    report = EvaluationPipeline(models={"before": str(demo_model()), "after": str(options.run)},
                                metrics=QUALITY + TIMES * options.times,
                                test_cases=PACKAGE / "demo" / "test.jsonl", max_new_tokens=48, batch_size=80).run()
    content = json.loads(report.to_json())
    content["settings"]["test_cases"] = "src/gazelle/demo/test.jsonl"
    for case in content["cases"]:
        case["where"] = Path(case["where"]).name  # of the file, not of this machine
    for model, place in zip(content["models"].values(), ("SmolLM2-135M-Instruct", "gazelle demo"), strict=True):
        model["model"] = place
    options.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.report:
        report.save(options.report)
    print(report.to_markdown())


if __name__ == "__main__":
    main()
