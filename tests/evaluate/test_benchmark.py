"""`benchmark` on a tiny model: what it measures, what it leaves as it was, and memory that runs out."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle import FastLanguageModel, benchmark
from gazelle.base.errors import OptionError
from gazelle.evaluate.benchmark_report import OUT_OF_MEMORY

QUICK = {"seq_lengths": [8, 16], "batch_sizes": [1, 2], "warmup": 0, "iterations": 2, "new_tokens": 3}


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)).eval()


def states(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("adapted", [False, True])
def test_every_cell_is_measured_and_the_model_is_as_before(tiny: Any, adapted: bool) -> None:
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["q_proj"])) if adapted else tiny
    model.eval()
    before, random = states(model), torch.get_rng_state()
    report = benchmark(model, **QUICK)
    assert [(cell.batch_size, cell.seq_length) for cell in report.cells] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    for cell in report.cells:
        assert not cell.inference_error and not cell.train_error
        assert cell.prefill_tokens_per_second and cell.first_token_seconds and cell.step_seconds
        assert cell.prefill_tokens_per_second * cell.first_token_seconds == pytest.approx(
            cell.batch_size * cell.seq_length)
        assert cell.train_tokens_per_second == pytest.approx(cell.batch_size * cell.seq_length / cell.step_seconds)
        assert cell.decode_tokens_per_second and cell.decode_tokens_per_second > 0
    assert report.settings["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    after = states(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state()) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's highest resident size")
def test_training_takes_weights_and_what_adam_keeps() -> None:
    """A model large enough for the megabyte by which resident size is off."""
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=8192, max_position_embeddings=64, tie_word_embeddings=False))
    report = benchmark(model, **QUICK | {"seq_lengths": [8], "batch_sizes": [1]})
    cell, = report.cells
    weights = report.settings["weights_bytes"]
    assert weights > 16e6 and cell.train_bytes is not None
    assert 2.5 * weights < cell.train_bytes < 6 * weights  # gradients, and two moments if a step is taken


def test_what_it_writes(tiny: Any, tmp_path: Path) -> None:
    report = benchmark(tiny, **QUICK, train=False)
    text = report.to_markdown()
    assert text.count("\n| ") == 5 and "medians of 2 iterations after 0" in text and "| – |" in text
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["seq_length"] for row in rows] == ["8", "16", "8", "16"]
    assert float(rows[0]["prefill_tokens_per_second"]) > 0 and rows[0]["train_tokens_per_second"] == ""
    assert json.loads(report.to_json())["cells"][3]["batch_size"] == 2
    figure = report.plot(tmp_path / "bench.png")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Prefill, tokens/s", "Decoding, tokens/s"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert imread(tmp_path / "bench.png")[..., :3].std() > 0.02


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate"),
])
def test_memory_that_runs_out_is_marked(tiny: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    forward = type(tiny).forward

    def scarce(self: Any, *args: Any, **inputs: Any) -> Any:
        rows, length = inputs["input_ids"].shape
        if rows * length >= (32 if inputs.get("labels") is None else 16):
            raise error
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(tiny), "forward", scarce)
    before = states(tiny)
    report = benchmark(tiny, **QUICK)
    assert [cell.inference_error for cell in report.cells] == ["", "", "", OUT_OF_MEMORY]
    assert [cell.train_error for cell in report.cells] == ["", OUT_OF_MEMORY, OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert report.cells[3].first_token_seconds is None and report.cells[2].first_token_seconds is not None
    assert report.to_markdown().splitlines()[-3].count(OUT_OF_MEMORY) == 6
    assert len(report.plot().axes) == 3
    after = states(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_errors_are_no_results(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(tiny), "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        benchmark(tiny, **QUICK)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_type_for_a_while(tiny: Any, name: str, dtype: torch.dtype) -> None:
    seen = []
    hook = tiny.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    before = states(tiny)
    report = benchmark(tiny, seq_lengths=[4], batch_sizes=[1], dtype=name, warmup=0, iterations=1, new_tokens=1)
    hook.remove()
    assert set(seen) == {dtype} and f"torch.{report.settings['dtype']}" == str(dtype)
    assert report.settings["weights_bytes"] * 2 == pytest.approx(sum(p.nbytes for p in tiny.parameters()), rel=0.01)
    assert tiny.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


def test_types_that_cannot_be_used(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="cannot compute in this type"):
        benchmark(tiny, **QUICK, dtype="fp7")

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "silu", refuses)
    with pytest.raises(OptionError, match="cpu does not compute in float16") as caught:
        benchmark(tiny, **QUICK, dtype="fp16")
    assert "Half" in caught.value.found
    assert tiny.dtype == torch.float32


def test_quantised_models_are_measured_as_they_are(tiny_folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_folder), load_in_4bit=True)
    assert len(benchmark(model, tokenizer, [8], [1], warmup=0, iterations=1, new_tokens=1).cells) == 1
    with pytest.raises(OptionError, match="as it is"):
        benchmark(model, tokenizer, **QUICK, dtype="fp16")


@pytest.mark.parametrize(("options", "said"), [
    ({"seq_lengths": []}, "seq_lengths"), ({"batch_sizes": [0]}, "batch_sizes"), ({"iterations": 0}, "iterations"),
    ({"seq_lengths": [511]}, "positions reach"),
])
def test_numbers_out_of_range(tiny: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        benchmark(tiny, **QUICK | options)
    assert said in str(caught.value)
