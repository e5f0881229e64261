"""Tensors parked in host memory come back as they were, and their memory is free in between."""

import gc
from dataclasses import replace

import pytest
import torch
from tests.models.families import adapt, gradients, make, packed, rows, twin
from torch import Tensor

from gazelle import accelerate
from gazelle.engine.keep import ALL, AWAY, OFFLOAD, OUTPUT, OUTPUT_AWAY, Keep
from gazelle.engine.offload import park, settle
from gazelle.models.packed import packed_attention_on
from gazelle.models.swap import swapped_layers
from gazelle.train.loss import batch_loss

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIB = 2**20


def gpu(function: object) -> object:
    for mark in GPU:
        function = mark(function)  # type: ignore[operator]
    return function


def test_a_cpu_has_nowhere_to_park() -> None:
    x = torch.randn(3, 4)
    parked, = park(x)
    settle(x.device)
    parked.fetch()
    assert parked.get() is x


@gpu
def test_a_round_trip() -> None:
    tensors = [torch.randn(2**20, device="cuda").to(dtype) for dtype in (torch.float32, torch.bfloat16) * 4]
    copies = [tensor.clone() for tensor in tensors]
    parked = [*park(*tensors[:3]), *park(tensors[3]), *park(*tensors[4:])]
    del tensors
    scribble = [torch.zeros(2**20, device="cuda") for _ in range(8)]
    settle(torch.device("cuda", 0))
    for number in reversed(range(8)):
        if number % 2:
            parked[number].fetch()
            parked[number].fetch()  # once is enough
        assert torch.equal(parked[number].get(), copies[number])
    assert not any(zeros.any() for zeros in scribble)


@gpu
def test_what_is_parked_is_not_what_is_written_later() -> None:
    """To the same memory, by the computing stream, as soon as the tensor is let go."""
    for turn in range(20):
        x = torch.full((4 * MIB,), float(turn), device="cuda")
        parked = park(x)
        del x
        for _ in range(4):
            y = torch.full((4 * MIB,), -1.0, device="cuda")
            parked += park(y)
            del y
        settle(torch.device("cuda", 0))
        assert parked[0].get().eq(turn).all()


@gpu
def test_memory_is_free_in_between_and_buffers_are_used_again() -> None:
    gc.collect()  # what other tests left
    before = torch.cuda.memory_allocated()
    pointers = []
    for _ in range(3):
        parked = [one for _ in range(3) for one in park(*(torch.ones(16 * MIB, device="cuda") for _ in range(2)))]
        settle(torch.device("cuda", 0))
        assert torch.cuda.memory_allocated() == before
        pointers.append({each._host.data_ptr() for each in parked})
        assert all(each.get().sum().item() == 16 * MIB for each in parked)
    assert torch.cuda.memory_allocated() == before
    assert pointers[0] == pointers[1] == pointers[2]


@gpu
def test_training_with_inputs_on_the_host() -> None:
    """The bits of training without, in less memory. Rows are short: attention adds their gradients in one order."""
    model = adapt(make("llama3", 0, hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=64), r=8).to("cuda", torch.bfloat16)
    texts = packed(rows(0, (64,) * 500), "cuda")
    results, peaks = [], []

    def steps(keep: Keep) -> list[tuple[float, dict[str, Tensor]]]:
        each = accelerate(twin(model))
        for layer in swapped_layers(each):
            layer.gazelle.keep = keep
        found = []
        with packed_attention_on(each):
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                loss, _ = batch_loss(each, texts)
                loss.backward()
                peaks.append(torch.cuda.max_memory_allocated() - before)
                found.append((loss.item(), gradients(each)))
        return found

    for keep in (ALL, OFFLOAD, AWAY, replace(AWAY, mlp=False), OUTPUT, OUTPUT_AWAY):
        results.append(steps(keep))
        del peaks[-3:-1]
    for result in results[1:]:
        for (loss, grads), (wanted, wanted_grads) in zip(result, results[0], strict=True):
            assert loss == wanted
            assert all(torch.equal(grads[name], grad) for name, grad in wanted_grads.items())
    assert peaks[1] < peaks[0] - 6 * 500 * 64 * 256 * 2  # of twelve inputs, some are on their way
