"""Every op of this folder, timed on this machine.

    python -m benchmarks.ops [NAME...] [--out benchmarks/results/ops.json]

A name is a file of this folder without its ending; without one, all of them run. The file is written after each op, and
keeps what it holds of others if that was measured on the same machine with the same versions.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "results" / "ops.json")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")

    facts, failed = machine(), []
    found = earlier(options.out, facts)
    for name in options.names or NAMES:
        print(f"{name} on {facts['device']}", flush=True)
        began = time.perf_counter()
        found[name] = []
        try:
            measure(name, found[name])
        except Exception:  # noqa: BLE001 - one op that fails here must not cost the others
            traceback.print_exc()
            failed.append(name)
        print(f"  {time.perf_counter() - began:.0f} s\n", flush=True)
        write(options.out, facts, found)
    print(f"written to {options.out}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def measure(name: str, results: list[dict[str, Any]]) -> None:
    """Add all cases of an op to `results`, and print them as they come."""
    import torch
    from benchmarks.ops._timing import line

    for result in importlib.import_module(f"benchmarks.ops.{name}").cases():
        results.append(result)
        print("  " + line(result), flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not results:
        print("  nothing that this machine can run")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from gazelle.base.device import default_device, device_name
    from gazelle.base.machine import machine_facts

    try:
        facts = machine_facts()
    except importlib.metadata.PackageNotFoundError:  # run from its sources, where not all packages have to be
        import datetime

        facts = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                 "device": device_name(default_device()), "python": platform.python_version(),
                 "system": f"{platform.system()} {platform.machine()}"}
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts["versions"] = facts.get("versions", {}) | {"torch": torch.__version__}
    for package in ("triton", "liger_kernel"):
        try:
            facts["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def earlier(path: Path, facts: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the file holds by op, if all of it was measured on a machine like this one."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    if any(held["machine"].get(key) != facts.get(key) for key in ("device", "gpu", "versions", "cores")):
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for result in held["cases"]:
        found.setdefault(result["op"], []).append(result)
    return found


def write(path: Path, facts: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [result for name in NAMES for result in found.get(name, [])]
    path.write_text(json.dumps({"machine": facts, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
