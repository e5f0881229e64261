"""Weights that are not numbers are found though quantising hides them, and nothing of the search stays behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from gazelle.base.errors import ModelError
from gazelle.models.finite import Sums, summed_while_quantised
from gazelle.models.load import load_model

NAN, INF = float("nan"), float("inf")
FILE = "model.safetensors"
LOADING = pytest.mark.parametrize("loading", [{"load_in_4bit": True}, {"load_in_4bit": True, "quant_method": "fp4"},
                                              {"load_in_8bit": True}, {"load_in_4bit": False}],
                                  ids=["nf4", "fp4", "int8", "dense"])


def change(folder: Path, name: str, values: list[float]) -> None:
    """Overwrite the last numbers of a tensor."""
    weights = load_file(folder / FILE)
    weights[name].view(-1)[-len(values):] = torch.tensor(values)
    save_file(weights, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums(dtype: torch.dtype) -> None:
    def finite(*tensors: torch.Tensor) -> bool:
        sums = Sums()
        for tensor in tensors:
            sums.add(tensor)
        return sums.finite()

    good = torch.ones(3, 4, dtype=dtype)
    assert finite()
    assert finite(good, good[0], torch.zeros(0, dtype=dtype))
    for bad in ([NAN], [INF], [-INF], [INF, -INF]):
        for tensors in ([torch.tensor(bad, dtype=dtype), good], [good, good, torch.tensor(bad, dtype=dtype)]):
            assert not finite(*tensors)
    assert finite(torch.full((100_000,), 1000.0, dtype=dtype))  # beyond what float16 can count
    # What has no NaN, or no numbers, is not looked at.
    assert finite(torch.full((3,), 255, dtype=torch.uint8), torch.empty(3, dtype=dtype, device="meta"),
                  torch.tensor([NAN]).to(torch.float8_e4m3fn), torch.tensor([1 << 40]))


@LOADING
@pytest.mark.parametrize(("name", "value"), [
    ("model.layers.0.self_attn.q_proj.weight", NAN), ("model.layers.1.mlp.down_proj.weight", INF),
    ("model.embed_tokens.weight", -INF), ("model.norm.weight", NAN),
])
def test_a_tensor_that_is_no_number_is_named(name: str, value: float, loading: dict[str, Any],
                                             checkpoint: Path) -> None:
    change(checkpoint, name, [value])
    with pytest.raises(ModelError, match="not numbers") as caught:
        load_model(str(checkpoint), **loading)
    assert caught.value.where.endswith(name)
    assert "1 of" in caught.value.found


@pytest.mark.parametrize("loading", [{"load_in_4bit": True}, {"load_in_4bit": False}], ids=["nf4", "dense"])
def test_finite_numbers_whose_sum_overflows_are_weights(loading: dict[str, Any], checkpoint: Path) -> None:
    change(checkpoint, "model.embed_tokens.weight", [3e38, 3e38])
    model, _ = load_model(str(checkpoint), **loading)
    assert model.get_input_embeddings().weight.flatten()[-1] == 3e38


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                      "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_what_is_quantised_is_the_same(options: dict[str, Any], checkpoint: Path, tiny: Callable[..., Any]) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(**options),
                                                    device_map={"": "cpu"}, dtype=torch.float32)

    plain = load()
    with summed_while_quantised() as sums:
        noted = load()
    assert type(noted.hf_quantizer).__name__ == type(plain.hf_quantizer).__name__
    ours, theirs = noted.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # One sum for each linear layer's weight, as it was before.
    wanted = [float(module.weight.detach().sum()) for name, module in tiny().named_modules()
              if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    torch.testing.assert_close(sorted(map(float, sums._sums)), sorted(wanted), rtol=1e-4, atol=1e-4)


def test_transformers_is_as_it_was() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    with summed_while_quantised():
        assert {name for name, kind in AUTO_QUANTIZER_MAPPING.items() if before[name] is not kind} \
            == {"bitsandbytes_4bit", "bitsandbytes_8bit"}
    assert before == AUTO_QUANTIZER_MAPPING
    with pytest.raises(ZeroDivisionError), summed_while_quantised():
        raise ZeroDivisionError
    assert before == AUTO_QUANTIZER_MAPPING
