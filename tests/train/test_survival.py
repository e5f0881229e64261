"""Twenty `kill -9` and forty damaged checkpoints on every change; `benchmarks/results/survival.json` has 200."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAULTS = ("checkpoints lost", "bad loads", "undetected", "without falling back")


def check(found: dict[str, dict[str, int]], kills: int, damages: int) -> None:
    savers, trainings, damaged = (found[name] for name in ("processes that only save", "tiny trainings",
                                                           "damaged checkpoints"))
    assert savers["kills"] + trainings["kills"] >= kills
    assert 2 * (savers["inside a save"] + trainings["inside a save"]) >= kills
    assert damaged["corruptions"] >= damages
    assert not any(part.get(name) for part in (savers, trainings, damaged) for name in FAULTS)
    assert trainings["runs completed"] >= 1


def test_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks.survival", "--kills", "17", "--trainings", "3",
                           "--corruptions", "40", "--seed", "1", "--out", str(out)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(out.read_text()), 20, 40)


def test_the_committed_result_holds() -> None:
    check(json.loads((ROOT / "benchmarks" / "results" / "survival.json").read_text()), 200, 200)
