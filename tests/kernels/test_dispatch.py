"""A Triton kernel where Triton compiles, the reference elsewhere."""

import subprocess
import sys

import pytest
import torch

from gazelle.kernels import (
    activation,
    activation_triton,
    border,
    border_triton,
    cross_entropy,
    cross_entropy_triton,
    dispatch,
    fp8,
    fp8_triton,
    gather,
    gather_triton,
    int8,
    int8_triton,
    low_rank,
    low_rank_triton,
    nf4,
    nf4_triton,
    norm,
    norm_triton,
    rotary,
    rotary_triton,
)


class Somewhere:
    """Stands for a tensor on a device that is not here."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize(("device", "want"), [("cuda", True), ("cuda:1", True), ("xpu", True), ("cpu", False),
                                              ("mps", False), ("meta", False)])
def test_by_device(device, want, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert dispatch.use_triton(Somewhere(device)) is want
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert not dispatch.use_triton(Somewhere(device))


@pytest.mark.parametrize("found", [None, object()])
def test_triton_is_looked_for_once(found, monkeypatch):
    asked = []

    def look(name):
        asked.append(name)
        return found

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", look)
    dispatch.has_triton.cache_clear()
    try:
        assert [dispatch.has_triton() for _ in range(3)] == [found is not None] * 3
        assert asked == ["triton"]
    finally:
        dispatch.has_triton.cache_clear()


OPS = [
    (norm, norm_triton, "rms_norm", "rms_norm_backward", "rms_norm_weight_grad"),
    (rotary, rotary_triton, "rotate_", "rotate_into"),
    (activation, activation_triton, "gated", "gated_backward", "gated_backward_sums"),
    (cross_entropy, cross_entropy_triton, "cross_entropy_"),
    (gather, gather_triton, "gather_rows"),
    (border, border_triton, "fill_borders"),
    (low_rank, low_rank_triton, "add_low_rank"),
    (nf4, nf4_triton, "dequantize", "dequantize_transposed"),
    (int8, int8_triton, "dequantize", "dequantize_transposed"),
    (fp8, fp8_triton, "quantize_rows", "divide_rows", "divide_rows_transposed"),
]


@pytest.mark.parametrize(("reference", "kernels", "name"), [
    pytest.param(reference, kernels, name, id=f"{reference.__name__.split('.')[-1]}.{name}")
    for reference, kernels, *names in OPS for name in names])
def test_arguments_reach_the_kernel(reference, kernels, name, monkeypatch):
    """Every op asks, and hands all it was given to its own kernel in the same order."""
    calls = []
    monkeypatch.setattr(reference, "use_triton", lambda x: True)
    monkeypatch.setattr(kernels, name.removesuffix("_transposed"), lambda *a, **options: calls.append((a, options)))
    function = getattr(reference, name)
    given = [object() for _ in range(function.__code__.co_argcount)]
    function(*given)
    options = {"transposed": name.endswith("_transposed")} if "dequantize" in name or "divide" in name else {}
    assert calls == [(tuple(given), options)]


def test_the_reference_does_not_import_triton():
    modules = ", ".join(reference.__name__.split(".")[-1] for reference, *_ in OPS)
    code = (f"import sys, torch\nfrom gazelle.kernels import {modules}\n"
            "before = 'triton' in sys.modules\n"
            "norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)\n"
            "assert before or 'triton' not in sys.modules\n"
            "assert not [name for name in sys.modules if name.endswith('_triton') and name.startswith('gazelle')]")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_kernel(monkeypatch):
    x = torch.ones(2, 4, device="cuda")
    assert dispatch.use_triton(x)
    monkeypatch.setattr(norm_triton, "rms_norm", lambda *a: "kernel")
    assert norm.rms_norm(x, x[0], 1e-6) == "kernel"
