"""How much memory something takes beyond what was in use before it."""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """Bytes in use at the start of a block, and most in use at once beyond those; None until then, or where nothing
    tells."""

    before: int | None = None
    bytes: int | None = None

    @property
    def peak(self) -> int | None:
        """Most bytes in use at once."""
        return None if self.before is None or self.bytes is None else self.before + self.bytes


@contextlib.contextmanager
def memory_growth(device: str) -> Iterator[Growth]:
    """Measures the memory of a block: torch's on a CUDA device, this process's resident memory on Linux elsewhere.

    A block that raises is not measured. Blocks inside one another are not measured rightly: the inner one resets the
    mark.
    """
    growth = Growth()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        growth.before = torch.cuda.memory_allocated(device)
        yield growth
        torch.cuda.synchronize(device)
        growth.bytes = torch.cuda.max_memory_allocated(device) - growth.before
        return
    growth.before = _resident("VmRSS") if _forget_peak() else None
    yield growth
    if growth.before is not None:
        growth.bytes = max(0, _resident("VmHWM") - growth.before)


def _forget_peak() -> bool:
    """Begin to look for the highest resident size anew; False where the system cannot do that."""
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what is free, but kept for later, would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, TypeError):
        return False
    return True


def _resident(name: str) -> int:
    """A size in Linux's status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
