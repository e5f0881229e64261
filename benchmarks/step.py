"""The table: a training step by gazelle and by other libraries, each case in a process of its own.

    python -m benchmarks.step [ROW...] [--no-peers] [--who NAME...] [--out benchmarks/results/step-DEVICE.json]

Rows are those of benchmarks/shapes.py; without a name, all of them. A result takes the place of an earlier one of the
same row and library in the file, which is written after every case, so a long table can be measured in several goes.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import PEERS, ROWS, SHAPES, Row, Shape, missed
from benchmarks.weights import make_room, models_folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    options = arguments()
    folder = (options.models or models_folder(options.tiny)).resolve()
    rows = [ROWS[name] for name in options.rows or ROWS]
    cases = [(row, who) for row in rows for who in ("gazelle", *(row.peers if options.peers else ()))
             if not options.who or who in options.who]
    # Cases with the same weights follow each other: where memory is short, weights make room for others'.
    cases.sort(key=lambda case: list(SHAPES).index(shape_of(*case).name))
    found = []
    path = options.out or (Path(tempfile.gettempdir()) / "step-tiny.json" if options.tiny else None)
    for row, who in cases:
        print(f"{row.name}, {who} …", flush=True)
        result = measure(row, who, folder, options)
        found.append(result)
        if result["error"] is None and path is None:
            path = RESULTS / f"step-{slug(result['machine']['device'])}.json"
        if path is not None:
            keep(path, found)
    if path is None:  # nothing ran, so no device is known
        path = RESULTS / "step-failed.json"
        keep(path, found)
    print_table(json.loads(path.read_text())["results"], {row.name for row, _ in cases})
    print(f"written to {path}")
    return int(any(result["error"] for result in found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries too")
    parser.add_argument("--who", nargs="+", choices=["gazelle", *PEERS], help="these alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step-DEVICE.json")
    parser.add_argument("--models", type=Path, help="where checkpoints are kept; default: in memory")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a case may take")
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a first look")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows, to try the benchmark itself")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    return options


def shape_of(row: Row, who: str) -> Shape:
    return row.shape if who == "gazelle" else PEERS[who].shape(row)


def measure(row: Row, who: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a case; one that fails has its error's line."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    case = {"row": row.name, "label": row.label, "who": who, "date": today}
    shape = shape_of(row, who)
    tiny = ["--tiny"] if options.tiny else []
    module = ["gazelle_step"] if who == "gazelle" else ["peer_step", "--peer", who]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        out = Path(scratch) / "result.json"
        error = None
        if not (folder / shape.name / "ok").exists():
            make_room(shape.tiny() if options.tiny else shape, folder)
            error = run(["weights", shape.name, "--folder", str(folder), *tiny], scratch, options.timeout)
        error = error or run([*module, row.name, "--model", str(folder / shape.name), "--out", str(out), "--scratch",
                              str(Path(scratch) / "run"), *tiny, *(["--quick"] if options.quick else [])],
                             scratch, options.timeout)
        if error is None and not out.exists():
            error = "it ended without a result"
        return case | (json.loads(out.read_text()) if error is None else {"error": error})


def run(arguments: list[str], scratch: str, timeout: float) -> str | None:
    """Run a module of the benchmarks; returns the line that names its error, or None."""
    paths = [str(ROOT / "src"), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_cache"),
    }
    # In the scratch folder, where a library may leave what it likes.
    try:
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]], cwd=scratch,
                              env=environment, capture_output=True, text=True, errors="replace", timeout=timeout,
                              check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    print("\n".join(f"    {line[:200]}" for line in lines[-12:]), file=sys.stderr, flush=True)
    # Messages of several lines follow the line with the error's name, which stands at the left margin.
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines or [f"exit code {done.returncode}"])[-1][:300]


def keep(path: Path, found: list[dict[str, Any]]) -> None:
    """Write the results, those of earlier goes with them."""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    if path.exists():
        earlier = json.loads(path.read_text())
        machine, versions, results = earlier["machine"], earlier["versions"], earlier["results"]
    for result in found:
        entry = dict(result)
        machine = entry.pop("machine", machine)
        versions = versions | entry.pop("versions", {})
        results = [other for other in results if (other["row"], other["who"]) != (entry["row"], entry["who"])] + [entry]
    results.sort(key=lambda result: (list(ROWS).index(result["row"]), ["gazelle", *PEERS].index(result["who"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "versions": dict(sorted(versions.items())),
               "date": max(result["date"] for result in results), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def slug(device: str) -> str:
    """"NVIDIA H200" as "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def print_table(results: list[dict[str, Any]], names: set[str]) -> None:
    rates = {result["row"]: result["tokens_per_second"] for result in results
             if result["who"] == "gazelle" and result["error"] is None}
    print(f"\n{'row':<22}{'who':<14}{'tokens/s':>10}{'peak GB':>9}{'load s':>8}{'first s':>9}  predicted; missed")
    for result in results:
        if result["row"] not in names:
            continue
        start = f"{result['row']:<22}{result['who']:<14}"
        if result["error"] is not None:
            print(f"{start}failed: {result['error'][:80]}")
            continue
        notes = []
        if result["predicted_peak_gb"] is not None:
            notes.append(f"{result['predicted_peak_gb']:.2f} GB")
        if result["predicted_step_s"] is not None:
            notes.append(f"step {result['predicted_step_s'] / result['step_s'] - 1:+.0%}")
        if result["who"] == "gazelle":
            notes += missed(ROWS[result["row"]], result, rates)
        print(f"{start}{result['tokens_per_second']:>10,.0f}{result['peak_gb']:>9.2f}{result['load_s']:>8.1f}"
              f"{result['first_step_s']:>9.1f}  {', '.join(notes)}")


if __name__ == "__main__":
    sys.exit(main())
