"""Checkpoints of random weights in memory: python -m benchmarks.weights MODEL [--folder FOLDER] [--tiny]

They are made once; a folder that has the file `ok` is whole.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.shapes import GB, SHAPES, Shape
from benchmarks.text import train_tokenizer

ROOM = 8 * GB  # left free beside the weights, in memory that training needs as well


def models_folder(tiny: bool = False) -> Path:
    """Where checkpoints are kept by default: in memory where the machine has such a file system."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / ("models-tiny" if tiny else "models")


def make_room(shape: Shape, folder: Path) -> None:
    """Delete other models' checkpoints in `folder`, the largest first, until there is space for this one."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted((other for name, other in SHAPES.items() if name != shape.name and (folder / name / "ok").exists()),
                    key=lambda other: other.parameters)
    while others and free_bytes(folder) < 2 * shape.parameters + ROOM:
        shutil.rmtree(folder / others.pop().name)


def free_bytes(folder: Path) -> int:
    """Of the file system, and of the host's memory where it lies there."""
    free = shutil.disk_usage(folder).free
    facts = Path("/proc/meminfo")
    if folder.is_relative_to("/dev/shm") and facts.exists():
        available = next(line for line in facts.read_text().splitlines() if line.startswith("MemAvailable"))
        free = min(free, int(available.split()[1]) * 1024)
    return free


def make(shape: Shape, target: Path) -> None:
    """Write the checkpoint with a tokenizer to `target`, in bfloat16."""
    import torch
    import transformers

    shutil.rmtree(target, ignore_errors=True)
    config = getattr(transformers, f"{shape.family}Config")(**shape.config())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{shape.family}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(target, max_shard_size="5GB")
    train_tokenizer().save_pretrained(target)
    (target / "ok").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept")
    parser.add_argument("--tiny", action="store_true", help="the same family in a size for trying this out")
    options = parser.parse_args()
    folder = options.folder or models_folder(options.tiny)
    shape = SHAPES[options.model]
    if not (folder / shape.name / "ok").exists():
        make(shape.tiny() if options.tiny else shape, folder / shape.name)


if __name__ == "__main__":
    main()
