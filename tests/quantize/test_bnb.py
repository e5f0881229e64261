"""Dequantised weights are bit-equal to what bitsandbytes computes with."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from gazelle.base.errors import ModelError
from gazelle.quantize.bnb import dequantize_linear, forbid_repacking, is_quantized_linear


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (8, 576)])
def test_4bit(kind, nested, shape):
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(torch.randn(shape), quant_type=kind, compress_statistics=nested,
                                     requires_grad=False).to("cpu")
    weight = dequantize_linear(layer)
    assert is_quantized_linear(layer)
    assert weight.shape == shape
    assert torch.equal(weight, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nested", [True, False])
def test_4bit_repacked_for_a_cpu(nested):
    weight = bnb.nn.Params4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=nested,
                               requires_grad=False).to("cpu")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer.weight = weight
    before = dequantize_linear(layer)
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    packed = weight.data.clone()
    torch.testing.assert_close(dequantize_linear(layer), before, atol=0, rtol=2**-8)  # scales are bfloat16 now
    assert torch.equal(weight.data, packed)
    assert weight.quant_state.packing_format_for_cpu


def test_repacking_can_be_forbidden():
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu").eval()
    forbid_repacking(layer)
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    assert torch.equal(layer.weight.data, before)


def test_8bit():
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(32, 64), has_fp16_weights=False, requires_grad=False).to("cpu")
    weight = dequantize_linear(layer)
    assert is_quantized_linear(layer)
    assert torch.equal(weight, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB))


def test_plain_layers_give_their_own_weight():
    layer = nn.Linear(4, 3)
    assert dequantize_linear(layer).data_ptr() == layer.weight.data_ptr()
    assert not is_quantized_linear(layer)


@pytest.mark.parametrize("make", [lambda: bnb.nn.Linear4bit(8, 8, device="meta"),
                                  lambda: bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False, device="meta")])
def test_layers_not_quantised_yet(make):
    with pytest.raises(ModelError, match="not been quantised yet"):
        dequantize_linear(make())
