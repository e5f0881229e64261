"""The estimate behind `use_gradient_checkpointing="auto"`, against what autograd really keeps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle import SFTConfig
from gazelle.data.encode import Encoded, Example
from gazelle.train.memory import activation_bytes, choose_checkpointing, largest_batch


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes of the distinct tensors, parameters aside, that a forward pass leaves for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=torch.arange(tokens)[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], torch.arange(tokens))
    return sum(kept.values())


def test_the_estimate_is_high_but_not_wild() -> None:
    config = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=512)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    kept = saved_bytes(model, 256)
    assert kept <= activation_bytes(config, 256, 256, 4) <= 2 * kept


class Model:
    """As much of a model as the choice looks at, on a GPU that this machine need not have."""

    device = torch.device("cuda:0")
    dtype = torch.bfloat16
    is_gradient_checkpointing = False

    def __init__(self) -> None:
        sizes = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256)
        self.config = SimpleNamespace(get_text_config=lambda: sizes)
        self.calls: list[str] = []

    def parameters(self) -> list[torch.Tensor]:
        return []

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.calls.append("checkpointing")

    def enable_input_require_grads(self) -> None:
        self.calls.append("inputs")


@pytest.mark.parametrize(
    ("free_gb", "choice", "on"),
    [(140, "auto", False), (16, "auto", True), (16, "unsloth", True), (16, False, False), (16, True, False)],
)
def test_on_only_where_it_does_not_fit(
    free_gb: int, choice: bool | str, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 140 * 10**9))
    model: Any = Model()
    model.use_gradient_checkpointing = choice
    rows = Encoded([Example([1] * 2048, [-100] * 1548 + [1] * 500, "row 1")] * 4)
    settings = SFTConfig(per_device_train_batch_size=4)
    assert choose_checkpointing(model, rows, settings, packed=True) is on
    assert model.calls == (["checkpointing", "inputs"] if on else [])


def test_the_largest_batch_counts_padding_and_bins() -> None:
    rows = Encoded([Example([1] * n, [-100] * (n - 2) + [1] * 2, "row") for n in (9, 5, 30, 7)])
    settings = SFTConfig(per_device_train_batch_size=2, max_length=64)
    assert largest_batch(rows, settings, packed=True) == (39, 4)
    assert largest_batch(rows, settings, packed=False) == (60, 60)
    settings.packing = True
    assert largest_batch(rows, settings, packed=True) == (128, 128)
