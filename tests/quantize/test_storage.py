"""Storages share their module's tensors and write what bitsandbytes computes with."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from gazelle.base.errors import ModelError
from gazelle.quantize.bnb import dequantize_linear
from gazelle.quantize.int8 import Int8
from gazelle.quantize.nf4 import NF4
from gazelle.quantize.storage import Dense, storage_of

SHAPE = (48, 128)


def four_bits(kind="nf4", nested=True, dtype=torch.float32, shape=SHAPE, **options):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=nested, **options)
    layer.weight = bnb.nn.Params4bit(torch.randn(shape).to(dtype), quant_type=kind, compress_statistics=nested,
                                     requires_grad=False, **options).to("cpu")
    return layer


def eight_bits():
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(SHAPE[1], SHAPE[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(SHAPE), has_fp16_weights=False, requires_grad=False).to("cpu")
    return layer


LAYERS = {
    "dense": lambda: nn.Linear(SHAPE[1], SHAPE[0], bias=False), "nf4": four_bits,
    "nf4 plain": lambda: four_bits(nested=False), "fp4": lambda: four_bits("fp4"), "int8": eight_bits,
    "bfloat16 storage": lambda: four_bits(quant_storage=torch.bfloat16),
}


@pytest.mark.parametrize("name", LAYERS)
def test_writes_into_a_corner(name):
    layer = LAYERS[name]()
    storage = storage_of(layer)
    assert storage.shape == SHAPE and storage.device == torch.device("cpu")
    whole = torch.full((SHAPE[0] + 8, SHAPE[1] + 8), 7.0)
    out = whole[: SHAPE[0], : SHAPE[1]]
    storage.write(out)
    assert torch.equal(out, dequantize_linear(layer))
    assert (whole[SHAPE[0] :] == 7).all() and (whole[:, SHAPE[1] :] == 7).all()
    assert not out.requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_shares_its_tensors(name):
    layer = LAYERS[name]()
    storage = storage_of(layer)
    tensors = storage.tensors()
    assert layer.weight.data_ptr() in {tensor.data_ptr() for tensor in tensors.values()}
    assert storage.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    other = storage.with_tensors({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert type(other) is type(storage) and other.shape == storage.shape and other.dtype == storage.dtype
    back = other.with_tensors(tensors)
    assert torch.equal(back.write(torch.empty(SHAPE)), storage.write(torch.empty(SHAPE)))


@pytest.mark.parametrize("name", LAYERS)
def test_in_fp8(name):
    storage = storage_of(LAYERS[name]())
    weight = storage.write(torch.empty(SHAPE)).double()
    scales = storage.row_scales()
    assert scales.shape == SHAPE[:1] and scales.dtype == torch.float32 and not scales.requires_grad
    torch.testing.assert_close(scales.double(), weight.abs().amax(1) / 448, rtol=1e-6, atol=0)
    out = storage.write_fp8(torch.empty(SHAPE, dtype=torch.float8_e4m3fn), scales)
    whole = torch.empty(SHAPE[1], SHAPE[0] + 16, dtype=torch.float8_e4m3fn)
    turned = storage.write_fp8_transposed(whole[:, : SHAPE[0]], scales)
    assert torch.equal(out.float(), turned.float().t())
    error = (out.double() * scales[:, None] - weight).abs()
    assert (error <= 2**-4 * weight.abs() * (1 + 1e-6) + 2**-10 * scales[:, None]).all()


def test_kinds_and_types():
    assert isinstance(storage_of(LAYERS["dense"]()), Dense)
    assert isinstance(storage_of(four_bits()), NF4)
    assert isinstance(storage_of(eight_bits()), Int8)
    assert storage_of(four_bits(dtype=torch.bfloat16)).dtype == torch.bfloat16
    trained = nn.Linear(4, 3)
    assert storage_of(trained).weight is trained.weight


@pytest.mark.parametrize("nested", [True, False])
def test_repacked_for_a_cpu(nested):
    layer = four_bits(nested=nested, shape=(64, 128))
    before = storage_of(layer).write(torch.empty(64, 128))
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state)
    after = storage_of(layer).write(torch.empty(64, 128))
    torch.testing.assert_close(after, before, atol=0, rtol=2**-8)  # scales are bfloat16 now


@pytest.mark.parametrize("make", [lambda: bnb.nn.Linear4bit(8, 8, device="meta"),
                                  lambda: bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False, device="meta")])
def test_layers_not_quantised_yet(make):
    with pytest.raises(ModelError, match="not been quantised yet"):
        storage_of(make())
