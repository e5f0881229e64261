"""GGUF's block formats against libggml itself: bytes of plain blocks, errors of k-quants, every value read back."""

import gguf
import numpy as np
import pytest
import torch
from tests import ggml

from gazelle.base.errors import ModelError, OptionError
from gazelle.models.gguf_file import read_gguf
from gazelle.quantize.gguf import KINDS, dequantize, quantize

SIMPLE = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
SUPER = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
needs_ggml = pytest.mark.skipif(ggml.library() is None, reason=f"llama.cpp's libggml-base is not at {ggml.LIBRARY}")


@pytest.fixture(scope="module")
def weights(demo_gguf):
    """Weights of the demo model, which lie on the grid of Q4_1 and Q8_0; the same moved off it; random ones."""
    torch.manual_seed(0)
    file = read_gguf(demo_gguf)
    down = torch.tensor(file.read("blk.5.ffn_down.weight"))[:256]
    moved = torch.randn(256, 16) @ torch.randn(16, down.shape[1])
    return {
        "grid": down, "embedding": torch.tensor(file.read("token_embd.weight"))[:512].reshape(-1, 768),
        "merged": down + moved * (down.std() / moved.std() / 5), "normal": torch.randn(256, 1536) / 50,
        "heavy tails": torch.distributions.StudentT(4.0).sample((256, 1536)) / 50,
        "uniform": torch.rand(256, 1536) - 0.3,
    }


def odd_blocks():
    """Rows of 512 in which one thing is odd each."""
    torch.manual_seed(1)
    normal = torch.randn(512) / 50
    outlier, first, zeros = normal.clone(), normal.clone(), normal.clone()
    outlier[300], first[0], zeros[:256] = 30.0, -1.0, 0
    tie = normal.clamp(-0.02, 0.02)  # largest and smallest are as far from 0 in every block
    steps = torch.arange(512) % 32 / 8 - 2
    return torch.stack((torch.zeros(512), torch.full((512,), 0.7), torch.full((512,), -0.7), outlier, first, zeros, tie,
                        -tie, steps, -normal.abs() - 1, normal.abs() + 1, normal * 1e-6, normal * 1e-12, normal * 1e-36,
                        normal * 1e-42, normal * 1e4, normal / 1e3 + 5, normal.bfloat16().float()))


def error(data, weight, kind, importance=None):
    """Root of the mean square, each weighed with its importance."""
    squares = (ggml.dequantize(data, kind).double() - weight) ** 2
    return (squares if importance is None else squares * importance).mean().sqrt().item()


def importance_of(K):
    """Few columns matter most, as in a real imatrix."""
    return torch.rand(K, generator=torch.Generator().manual_seed(2)) ** 4 + 1e-3


def test_kinds_are_ggufs():
    assert list(KINDS) == ["f32", "f16", "bf16", *SIMPLE, *SUPER]
    for name, kind in KINDS.items():
        found = gguf.GGMLQuantizationType[name.upper()]
        assert kind.name == name and kind.value == found and (kind.block, kind.size) == gguf.GGML_QUANT_SIZES[found]


@needs_ggml
@pytest.mark.parametrize("kind", ["f16", "bf16", *SIMPLE])
def test_plain_blocks_are_llama_cpps_bytes(weights, kind):
    for name, weight in {**weights, "odd": odd_blocks()}.items():
        assert torch.equal(quantize(weight, kind), ggml.quantize(weight.contiguous(), kind)), name


@needs_ggml
@pytest.mark.parametrize("kind", SUPER)
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
def test_errors_of_k_quants(weights, kind, weighed):
    for name, weight in weights.items():
        importance = importance_of(weight.shape[1]) if weighed else None
        ours, theirs = quantize(weight, kind, importance), ggml.quantize(weight.contiguous(), kind, importance)
        assert ours.shape == theirs.shape
        assert error(ours, weight, kind, importance) <= 1.02 * error(theirs, weight, kind, importance), name
        assert error(ours, weight, kind) <= 1.02 * error(theirs, weight, kind), name  # nor at the others' cost


@needs_ggml
@pytest.mark.parametrize("kind", SIMPLE)
def test_errors_of_plain_blocks_with_importance(weights, kind):
    for name, weight in weights.items():
        importance = importance_of(weight.shape[1])
        ours, theirs = quantize(weight, kind, importance), ggml.quantize(weight.contiguous(), kind, importance)
        limit = 1.02 * error(theirs, weight, kind, importance) + 1e-5 * weight.std().item()  # the grid's own is 0
        assert error(ours, weight, kind, importance) <= limit, name


@needs_ggml
@pytest.mark.parametrize("kind", SUPER)
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
def test_odd_blocks(kind, weighed):
    weight = odd_blocks()
    importance = importance_of(weight.shape[1]) if weighed else None
    if weighed:
        importance[32:96] = 0
    ours, theirs = quantize(weight, kind, importance), ggml.quantize(weight, kind, importance)
    assert dequantize(ours, kind).isfinite().all()
    for number, row in enumerate(weight):
        found = [error(data[number, None], row, kind, importance) for data in (ours, theirs)]
        assert found[0] <= 1.15 * found[1] + 2**-12 * row.abs().max() + 1e-8, number  # two blocks; float16's luck
    assert not dequantize(ours[0], kind).any()


@needs_ggml
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "f32"])
def test_values_are_llama_cpps(kind):
    """Of random bytes, so that every bit of a block matters."""
    torch.manual_seed(0)
    data = torch.randint(0, 256, (64, KINDS[kind].size * 6), dtype=torch.uint8)
    ours, theirs = dequantize(data, kind), ggml.dequantize(data, kind)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~ours.isnan()])


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_gguf_package(kind):
    data = quantize(torch.randn(4, 512), kind)
    want = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(dequantize(data, kind).numpy(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_types_and_pieces(kind, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 5, 512)
    importance, threads = importance_of(512), torch.get_num_threads()
    data = quantize(weight, kind, importance)
    assert data.dtype == torch.uint8 and data.shape == (2, 3, 5, KINDS[kind].row(512))
    assert dequantize(data, kind).shape == weight.shape
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(quantize(turned, kind, importance), data)
    half = weight.bfloat16()
    assert torch.equal(quantize(half, kind), quantize(half.float(), kind))
    before = dequantize(data, kind)
    monkeypatch.setattr("gazelle.quantize.gguf._PIECE_CPU", 768)
    again = dequantize(quantize(weight, kind, importance), kind)
    assert torch.equal(again, before) if kind not in SUPER else (again != before).float().mean() < 0.02  # sums' order
    assert torch.equal(dequantize(data, kind), dequantize(data.flatten(0, 1), kind).view_as(weight))
    assert torch.get_num_threads() == threads
    assert quantize(weight[:0], kind).shape == (0, 3, 5, KINDS[kind].row(512))


@pytest.mark.parametrize("kind", [*SIMPLE, *SUPER])
def test_importance_moves_the_error(kind):
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    importance = torch.where(torch.arange(512) % 16 == 3, 100.0, 1.0)
    loss = [((dequantize(data, kind) - weight) ** 2 * importance).mean()
            for data in (quantize(weight, kind, importance), quantize(weight, kind))]
    assert loss[0] == loss[1] if kind == "q8_0" else loss[0] < 0.97 * loss[1]
    assert dequantize(quantize(weight, kind, torch.zeros(512)), kind).isfinite().all()


def test_what_is_refused():
    weight = torch.randn(2, 576)
    with pytest.raises(OptionError, match="no such type") as caught:
        quantize(weight, "q4_K_M")
    assert "q4_k" in str(caught.value)
    with pytest.raises(ModelError, match="q6_k") as caught:
        quantize(weight, "q6_k")
    assert "576" in str(caught.value) and "256" in str(caught.value) and "q8_0" in str(caught.value)
    with pytest.raises(ModelError, match="not blocks of q8_0"):
        dequantize(torch.zeros(2, 35, dtype=torch.uint8), "q8_0")
    with pytest.raises(ModelError, match="not blocks of q8_0"):
        dequantize(torch.zeros(2, 34), "q8_0")
    with pytest.raises(ModelError, match="without rows"):
        quantize(torch.tensor(1.0), "f32")
    for importance in (torch.ones(32), torch.full((576,), -1.0), torch.full((576,), torch.nan)):
        with pytest.raises(ModelError, match="importance"):
            quantize(weight, "q4_0", importance)


@pytest.mark.parametrize("kind", ["f16", *SIMPLE, *SUPER])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_weights_that_cannot_be_held(kind, bad):
    weight = torch.randn(3, 512)
    weight[1, 200] = bad
    with pytest.raises(ModelError, match=r"cannot hold|too large"):
        quantize(weight, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    torch.manual_seed(0)
    weight, importance = torch.randn(96, 1024) / 50, importance_of(1024)
    here, there = quantize(weight, kind), quantize(weight.cuda(), kind)
    assert there.is_cuda and torch.equal(dequantize(here.cuda(), kind).cpu(), dequantize(here, kind))
    if KINDS[kind].block < 256:
        assert torch.equal(there.cpu(), here)
    for chosen in (None, importance):
        errors = [(dequantize(quantize(weight.to(device), kind, chosen), kind).cpu() - weight).square().mean()
                  for device in ("cpu", "cuda")]
        torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)
