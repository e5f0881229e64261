"""Ctrl-C and SIGTERM: the step is finished and saved, and the run goes on from there as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import ROWS, small_llama
from tests.train.test_resume import weights_hash
from transformers import PreTrainedTokenizerBase, TrainerCallback

from gazelle import SFTTrainer
from gazelle.__main__ import main
from gazelle.train import interrupt
from gazelle.train.checkpoint import fault
from gazelle.train.interrupt import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., SFTTrainer]


@pytest.fixture(autouse=True)
def _ctrl_c_stops() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SignalAt(TrainerCallback):
    """Sends this process signals in the middle of a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers
        self.handlers: Any = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.handlers = signal.getsignal(signal.SIGINT)
            for number in self.numbers:  # one after another: of two at once only one might arrive
                signal.raise_signal(number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_saves_stops_and_goes_on(number: int, code: int, quick: Make, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"max_steps": 5, "eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = quick(**options)
    whole.train()
    out = Path(whole.args.output_dir)
    shutil.rmtree(out)
    before = handlers()
    trainer = quick(**options)
    trainer.add_callback(SignalAt(3, number))
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.code == code and isinstance(caught.value, SystemExit)
    assert trainer.state.global_step == 3 and handlers() == before
    assert fault(out / "checkpoint-3") is None
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 1  # none for the stop
    assert f"{signal.Signals(number).name}: saving after this step." in caplog.text
    assert f"Stopped at step 3 of 5, saved in {out / 'checkpoint-3'}" in caplog.text
    assert "trainer.train(resume_from_checkpoint=True) or gazelle train RECIPE --resume" in caplog.text
    again = quick(**options)
    again.train(resume_from_checkpoint=True)
    assert weights_hash(again.model) == weights_hash(whole.model)
    assert handlers() == before
    over = quick(**options)
    over.train(resume_from_checkpoint=True)  # nothing is left to do
    assert over.state.global_step == 5 and weights_hash(over.model) == weights_hash(whole.model)


class SignalLate(TrainerCallback):
    """Sends this process a signal when a step is over, behind the place where the run looks for one."""

    def __init__(self, step: int, event: str) -> None:
        self.step = step
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_one_behind_the_last_step_of_an_epoch_is_saved_too(quick: Make) -> None:
    trainer = quick(max_steps=-1, num_train_epochs=1, save_strategy="epoch", gradient_accumulation_steps=1)
    total = len(trainer.get_train_dataloader())
    trainer.add_callback(SignalLate(total, "on_step_end"))
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.state.global_step == total
    assert fault(Path(trainer.args.output_dir) / f"checkpoint-{total}") is None


def test_one_behind_everything_does_what_it_would_without_us(quick: Make) -> None:
    before = handlers()
    trainer = quick(max_steps=2)
    trainer.add_callback(SignalLate(2, "on_train_end"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert handlers() == before


def test_a_handler_that_was_not_set_from_python(quick: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told as None, and gives way to the default."""
    real, given = signal.signal, []
    monkeypatch.setattr(interrupt.signal, "signal", lambda number, handler: given.append(handler) or (
        real(number, handler) and None))
    before = handlers()
    try:
        quick(max_steps=1).train()
        assert given[-2:] == [signal.SIG_DFL] * 2
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            real(number, handler)


def test_a_second_one_stops_at_once(quick: Make) -> None:
    before = handlers()
    trainer = quick()
    trainer.add_callback(SignalAt(2, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and handlers() == before
    assert not list(Path(trainer.args.output_dir).glob("*checkpoint-*"))


def test_other_threads_leave_signals_alone(quick: Make) -> None:
    before = handlers()
    trainer = quick(max_steps=2)
    watch = SignalAt(2)
    trainer.add_callback(watch)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert watch.handlers == before[0] and trainer.state.global_step == 2


def test_on_the_command_line(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """The real command, a real signal; a second run in the folder is refused meanwhile."""
    small_llama(bytes_tokenizer, adapter=False).save_pretrained(tmp_path / "model")
    bytes_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {{name: {tmp_path / "model"}}}
lora: {{r: 4}}
data: {{train: {tmp_path / "rows.jsonl"}}}
train: {{max_steps: 100000, logging_steps: 1, per_device_train_batch_size: 1, report: false}}
output_dir: {tmp_path / "out"}
""")
    process = subprocess.Popen([sys.executable, "-m", "gazelle", "train", str(recipe)], stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    said = ""
    try:
        while "step 2/" not in said:
            said += process.stderr.readline()
        assert main(["train", str(recipe), "--resume"]) == 2
        assert f"process {process.pid}" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "gazelle train RECIPE --resume" in said
    saved = int(said.split("Stopped at step ")[1].split()[0])
    began = time.perf_counter()
    assert main(["train", str(recipe), "--resume", f"train.max_steps={saved + 2}"]) == 0
    assert time.perf_counter() - began < 60
    assert (tmp_path / "out" / f"checkpoint-{saved + 2}").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
