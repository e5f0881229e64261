"""Several processes: the first alone writes, all stop at the same step, and all go on to the bit."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.train.processes", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    whole, stopped, files, again, refused = first
    assert stopped == "143 at 2"  # both, though one alone got the signal
    assert files == "['process-0.json', 'process-0.safetensors', 'process-1.json', 'process-1.safetensors']"
    assert again == whole
    assert refused == "there is no checkpoint to resume from"
