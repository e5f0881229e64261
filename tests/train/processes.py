"""A run on two processes, begun, cut and gone on from: what `torchrun` starts in `test_processes.py`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tests.data.conftest import small_tokenizer
from tests.train.conftest import ROWS, small_llama
from tests.train.test_resume import dropped, weights_hash
from transformers import TrainerCallback

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import UserError
from gazelle.data.templates import TEMPLATES, get_template
from gazelle.train import saving
from gazelle.train.interrupt import Interrupted

RANK = int(os.environ["RANK"])


class Term(TrainerCallback):
    """One of the processes alone gets a SIGTERM."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if RANK:
        saving.staged_checkpoint = None  # type: ignore[assignment] — the first process alone may write
    tokenizer = small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")

    def run(name: str, resume: bool = False, callbacks: Any = None) -> str:
        config = SFTConfig(output_dir=str(folder / name), max_steps=6, save_steps=100, logging_steps=4, max_length=128,
                           per_device_train_batch_size=1, report=False, disable_tqdm=True, learning_rate=1e-2,
                           use_cpu=True)
        model = dropped(small_llama(tokenizer, adapter=False, num_hidden_layers=2))
        trainer = SFTTrainer(model, config, ROWS, None, tokenizer, callbacks=callbacks)
        torch.manual_seed(RANK)  # each process draws its own dropout
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Interrupted as stop:
            return f"{stop.code} at {trainer.state.global_step}"
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        return f"{weights_hash(trainer.model)} {entries[-1]['loss']}"

    said = [run("whole"), run("cut", callbacks=[Term()])]
    saved = sorted(path.name for path in (folder / "cut").glob("checkpoint-*/process-*"))
    said += [str(saved), run("cut", resume=True)]
    try:
        run("empty", resume=True)
    except UserError as error:
        said.append(error.what)
    (folder / f"said-{RANK}").write_text("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
