"""`kill -9` at random moments, half of them inside a save, and damaged checkpoints: what is lost, and what loads badly.

    python -m benchmarks.survival --out benchmarks/results/survival.json

Processes that do nothing but save, and tiny trainings, are forked, killed, and gone on from. After each kill the newest
checkpoint that the process had reported must be there and verify, and hold what was written. A training that was killed
until it got through must end with the weights of one that never was. Then checkpoints are damaged: every damage must be
found, and an undamaged one be taken.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gazelle.base.lock import folder_lock
from gazelle.base.machine import machine_facts
from gazelle.train.checkpoint import checkpoints, fault, find_checkpoint, recover, rotate, staged_checkpoint, step_of

Child = Callable[[Path, Callable[[str], None]], None]
SAVING, SAVED = "saving", "saved"


def content(step: int, name: str) -> bytes:
    """What a file of a step holds: different in every step, up to half a megabyte."""
    generator = random.Random(f"{step} {name}")
    return generator.randbytes(generator.randrange(1, 2**19))


NAMES = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "process-0.safetensors",
         "trainer_state.json")


def save_forever(folder: Path, say: Callable[[str], None]) -> None:
    """Go on from the newest checkpoint, and write one after the other, two at most at a time."""
    with folder_lock(folder):
        recover(folder)
        step = step_of(newest) if (newest := next(iter(checkpoints(folder)), None)) else 0
        while True:
            step += 1
            say(f"{SAVING} {step}")
            target = folder / f"checkpoint-{step}"
            with staged_checkpoint(target, 0) as staging:
                for name in NAMES:
                    (staging / name).write_bytes(content(step, name))
            rotate(folder, 2, [target])
            say(f"{SAVED} {step}")
            time.sleep(random.uniform(0, 0.05))  # a step of training, as it were


def train(folder: Path, say: Callable[[str], None]) -> None:
    """A tiny run of eight steps with a checkpoint at every one, gone on from if it was begun."""
    import torch
    from tests.train.conftest import ROWS, small_llama
    from tests.train.test_resume import weights_hash

    from gazelle import SFTConfig, SFTTrainer

    class Reporting(SFTTrainer):
        def _save_checkpoint(self, *args: Any) -> None:
            say(f"{SAVING} {self.state.global_step}")
            super()._save_checkpoint(*args)
            say(f"{SAVED} {self.state.global_step}")

    torch.set_num_threads(1)
    tokenizer = tokenizer_of_bytes()
    config = SFTConfig(output_dir=str(folder), max_steps=8, save_steps=1, save_total_limit=2, logging_steps=1,
                       learning_rate=1e-2, per_device_train_batch_size=2, max_length=128, report=False,
                       disable_tqdm=True)
    trainer = Reporting(small_llama(tokenizer), config, ROWS, None, tokenizer)
    with folder_lock(folder):
        recover(folder)
        trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    (folder / "weights").write_text(weights_hash(trainer.model))


def tokenizer_of_bytes() -> Any:
    from tests.data.conftest import small_tokenizer

    from gazelle.data.templates import TEMPLATES, get_template

    return small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")


def forked(child: Child, folder: Path) -> tuple[int, int]:
    """Process id of a child, and a pipe with what it says."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.close(reader)
    code = 1
    try:
        child(folder, lambda line: (os.write(writer, f"{line}\n".encode()), None)[1])
        code = 0
    finally:
        os._exit(code)


def killed(child: Child, folder: Path, inside: bool, generator: random.Random, span: float,
           reach: float) -> dict[str, Any]:
    """Let a child run, kill it at a random moment, and look at what is there.

    Args:
        inside: up to `reach` seconds after it has begun a save; else within `span` / 2 seconds of its start.
    """
    process, reader = forked(child, folder)
    os.set_blocking(reader, False)
    said, began = "", time.perf_counter()
    after = generator.uniform(0, span / 2)
    saves = generator.randrange(1, 4)

    def read() -> bool:
        """False once the child has closed its end."""
        nonlocal said
        try:
            chunk = os.read(reader, 65536)
        except BlockingIOError:
            return True
        said += chunk.decode()
        return bool(chunk)

    if inside:
        while said.count(SAVING) < saves and read():
            time.sleep(0.0002)
        time.sleep(generator.uniform(0, reach))
    else:
        while time.perf_counter() - began < after and read():
            time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    while read():
        pass
    os.close(reader)
    lines = said.split("\n")[:-1]
    reported = max([int(line.split()[1]) for line in lines if line.startswith(SAVED)], default=0)
    return {"killed": os.WIFSIGNALED(status), "inside": bool(lines) and lines[-1].startswith(SAVING),
            "reported": reported, "exit": None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)}


def finished(folder: Path) -> dict[str, Any]:
    """Let a training come to its end."""
    process, reader = forked(train, folder)
    status = os.waitpid(process, 0)[1]
    os.close(reader)
    return {"killed": False, "inside": False, "reported": 0, "exit": os.waitstatus_to_exitcode(status)}


def newest(folder: Path) -> Path | None:
    """What a run would go on from."""
    with folder_lock(folder):
        recover(folder)
        return find_checkpoint(True, str(folder)) if checkpoints(folder) else None


def reach_after(reach: float, outcome: dict[str, Any]) -> float:
    """How long after the beginning of a save to kill next: machines write at very different speeds."""
    return reach * (1.2 if outcome["inside"] else 0.6)


def kill_savers(count: int, generator: random.Random, folder: Path) -> dict[str, int]:
    """Kill processes that only save."""
    found = {"kills": 0, "inside a save": 0, "checkpoints lost": 0, "bad loads": 0}
    reported, reach = 0, 0.03
    while found["kills"] < count or found["inside a save"] * 2 < count:
        want_inside = found["inside a save"] * 2 < count
        outcome = killed(save_forever, folder, want_inside, generator, 0.2, reach)
        reach = reach_after(reach, outcome) if want_inside else reach
        if outcome["exit"] is not None:
            raise SystemExit("a process that only saves ended by itself")
        found["kills"] += outcome["killed"]
        found["inside a save"] += outcome["killed"] and outcome["inside"]
        reported = max(reported, outcome["reported"])
        there = newest(folder)
        if (step_of(there) if there else 0) < reported:
            found["checkpoints lost"] += 1
        if there and any((there / name).read_bytes() != content(step_of(there), name) for name in NAMES):
            found["bad loads"] += 1
    return found


def kill_trainings(count: int, generator: random.Random, folder: Path) -> dict[str, int]:
    """Kill trainings until they get through, and compare their weights with those of one that nobody killed."""
    found = {"kills": 0, "inside a save": 0, "checkpoints lost": 0, "bad loads": 0, "runs completed": 0}
    import tests.train.test_resume  # noqa: F401 — before forking, so that children need not
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    if finished(folder / "whole")["exit"]:
        raise SystemExit("the run that is compared with failed")
    span = time.perf_counter() - began
    expected = (folder / "whole" / "weights").read_text()
    number, reach = 0, 0.03
    while found["kills"] < count or found["inside a save"] * 2 < count:
        number += 1
        run, reported = folder / str(number), 0
        run.mkdir()
        while not (run / "weights").exists():
            inside = found["inside a save"] * 2 < count
            more = inside or found["kills"] < count
            outcome = killed(train, run, inside, generator, span, reach) if more else finished(run)
            reach = reach_after(reach, outcome) if inside else reach
            if outcome["exit"]:
                found["bad loads"] += 1
                break
            found["kills"] += outcome["killed"]
            found["inside a save"] += outcome["killed"] and outcome["inside"]
            reported = max(reported, outcome["reported"])
            there = newest(run)
            if (step_of(there) if there else 0) < reported:
                found["checkpoints lost"] += 1
        else:
            found["runs completed"] += 1
            found["bad loads"] += (run / "weights").read_text() != expected
    return found


def damage(kind: str, folder: Path, generator: random.Random) -> None:
    """Do something to the newest of the checkpoints in `folder`."""
    paths = checkpoints(folder)
    files = sorted(path for path in paths[0].iterdir() if path.stat().st_size)
    path = generator.choice(files)
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(data[:generator.randrange(len(data))])
    elif kind == "delete":
        path.unlink()
    else:
        candidates = [*files, paths[1] / path.name]
        other = generator.choice([other for other in candidates if other.exists() and other.read_bytes() != data])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


def corruptions(count: int, generator: random.Random, source: Path) -> dict[str, int]:
    """Damage the newest checkpoint of a training that has several."""
    found = {"corruptions": 0, "undetected": 0, "without falling back": 0}
    for number in range(count):
        kind = ("flip", "truncate", "delete", "swap")[number % 4]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            shutil.copytree(source, folder)
            target = checkpoints(folder)[0]
            damage(kind, folder, generator)
            found["corruptions"] += 1
            found["undetected"] += fault(target) is None
            sound = next(path for path in checkpoints(folder) if path != target and fault(path) is None)
            found["without falling back"] += find_checkpoint(True, str(folder)) != sound
    return found


def measure(saver_kills: int, training_kills: int, damages: int, seed: int) -> dict[str, Any]:
    """All three, on temporary folders."""
    generator = random.Random(seed)
    logging.getLogger("gazelle").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "saver").mkdir()
        savers = kill_savers(saver_kills, generator, folder / "saver")
        trainings = kill_trainings(training_kills, generator, folder)
        three = folder / "three"
        three.mkdir()
        for step in (1, 2, 3):
            with staged_checkpoint(three / f"checkpoint-{step}", 0) as staging:
                shutil.copytree(checkpoints(folder / "whole")[0], staging, dirs_exist_ok=True)
                (staging / "manifest.json").unlink()
                (staging / "optimizer.safetensors").write_bytes(content(step, "optimizer.safetensors"))
        damaged = corruptions(damages, generator, three)
    return {"processes that only save": savers, "tiny trainings": trainings, "damaged checkpoints": damaged}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=160, help="of processes that only save")
    parser.add_argument("--trainings", type=int, default=40, help="kills of trainings")
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    found = measure(options.kills, options.trainings, options.corruptions, options.seed)
    seconds = round(time.perf_counter() - began, 1)
    text = json.dumps(found | {"seconds": seconds, "machine": machine_facts()}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    faults = ("checkpoints lost", "bad loads", "undetected", "without falling back")
    return int(any(part.get(fault_) for part in found.values() for fault_ in faults))


if __name__ == "__main__":
    sys.exit(main())
