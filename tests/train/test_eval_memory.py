"""Evaluation never makes the logits of a batch, and takes no more memory than a training step."""

from typing import Any

import pytest
import torch
from tests.train.conftest import ROWS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gazelle import SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.numbers = max(self.numbers, tensor.numel() if not tensor._is_view() else 0)
        return output


def test_the_logits_of_a_batch_are_never_made(tiny: Any, demo_tokenizer: Any, tmp_path: Any) -> None:
    rows = [row | {"output": row["output"] * 12} for row in ROWS] * 4
    args = SFTConfig(output_dir=str(tmp_path), max_length=512, disable_tqdm=True, report=False, eval_samples=4,
                     per_device_train_batch_size=32, eval_generate=["chrf"], eval_max_new_tokens=3)
    trainer = SFTTrainer(tiny(), args, rows, rows, demo_tokenizer)
    batch = next(iter(trainer.get_eval_dataloader()))
    labelled, vocabulary = len(batch["targets"]), trainer.model.config.vocab_size
    assert labelled > 2000
    with Largest() as seen:
        trainer.evaluate()
    assert seen.numbers < labelled * vocabulary / 3

    with Largest() as whole:  # the check notices when they are made
        trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    assert whole.numbers >= labelled * vocabulary
