"""fp8, AWQ and GPTQ checkpoints: what plain transformers and compressed-tensors read is what was calibrated."""

import copy
import functools
import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tests.models.families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gazelle.adapters.lora import add_lora
from gazelle.adapters.merge import merged_tensors
from gazelle.base.errors import MissingDependencyError, ModelError, OptionError, OutputError
from gazelle.export.layers import Layers
from gazelle.export.own_text import own_text
from gazelle.export.quantised import save_quantised
from gazelle.export.smooth import smooth
from gazelle.models.load import load_model
from gazelle.quantize.awq import output_error
from gazelle.quantize.groups import Grid, fit, rounded

SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32}
ROWS = [torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 64, 50, 9)]


def shaken(model):
    """With adapters away from zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def adapted(model, tokenizer):
    """adapted("llama") is a random model with an adapter, sizes as real ones."""
    return lambda family="llama", **options: shaken(add_lora(model(family, **(SIZES | options)), r=4))


def decompressed(folder):
    """Weights by name, as the format's own library makes them from the file; all others as they are."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    codec = BaseCompressor.get_value_from_registry(config["format"])
    stored, weights = load_file(folder / "model.safetensors"), {}
    for name in list(stored):
        if name.endswith(".weight_scale"):
            stem = name.removesuffix(".weight_scale")
            parts = {key.removeprefix(f"{stem}."): stored.pop(key) for key in list(stored)
                     if key.startswith(f"{stem}.weight")}
            weights[f"{stem}.weight"] = codec.decompress(parts, scheme)["weight"]
    return weights, stored


def logits(model, ids=ROWS[0]):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def plainly_loaded(folder, dtype=torch.float32):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits(loaded)  # compressed layers are opened by their first pass
    return loaded


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq"])
def test_what_is_read_is_what_was_calibrated(method, adapted, tokenizer, tmp_path, monkeypatch):
    """Bit for bit: each layer's weights, as they were when the rows went through it, and as the library reads them."""
    seen, advance = {}, Layers.advance

    def noting(self, number):
        for name, weight in self.modules[number].named_parameters():
            seen[f"model.layers.{number}.{name}"] = weight.detach().clone()
        advance(self, number)

    monkeypatch.setattr(Layers, "advance", noting)
    model = adapted(tied=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = save_quantised(model, tokenizer, tmp_path / "out", method, calibration=ROWS, dtype="float16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights, others = decompressed(tmp_path / "out")
    assert len(weights) == 2 * 7
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    merged = dict(merged_tensors(model))
    if method == "fp8":
        for name, weight in weights.items():
            assert (weight.float() - merged[name]).norm() < 0.03 * merged[name].norm()
            assert report.errors[name] == pytest.approx(
                float((weight.float() - merged[name]).norm() / merged[name].norm()), rel=1e-4)
    else:
        assert seen.keys() == {name for name in (weights | others) if ".layers." in name}
        for name, weight in (weights | others).items():
            assert name not in seen or torch.equal(weight.float(), seen[name]), name
    loaded = plainly_loaded(tmp_path / "out", torch.float16)
    for name, weight in weights.items():
        assert torch.equal(loaded.get_parameter(name), weight)
    # The head and the embedding are whole, and nothing is far off.
    assert torch.equal(others["lm_head.weight"], merged["lm_head.weight"].half())
    assert report.worst[1] < {"fp8": 0.03, "awq": 0.2, "gptq": 0.3}[method]
    assert json.loads((tmp_path / "out" / "save_report.json").read_text())["worst"]["tensor"] == report.worst[0]


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq"])
def test_plain_transformers_answers_nearly_the_same(method, adapted, tokenizer, tmp_path):
    model = adapted(num_hidden_layers=2)
    want = logits(model)
    save_quantised(model, tokenizer, tmp_path / "out", method, calibration=ROWS, dtype="bfloat16")
    got = logits(plainly_loaded(tmp_path / "out"))
    assert (got - want).norm() / want.norm() < {"fp8": 0.06, "awq": 0.12, "gptq": 0.12}[method]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


def sizes_of(family):
    """Sizes that 32 divides and the family takes."""
    if family == "phi4-mini":  # its positions are made for heads of 16 numbers
        return SIZES | {"hidden_size": 64, "head_dim": 16}
    return SIZES


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family, adapted, tokenizer, tmp_path):
    """Beside plain rounding of the merged weights: random models shake at every rounding, but not more at these."""
    model = adapted(family, **sizes_of(family))
    want = logits(model)

    def error(other):
        return float((logits(other) - want).norm() / want.norm())

    for method, symmetric in (("gptq", True), ("awq", False)):
        save_quantised(model, tokenizer, tmp_path / method, method, calibration=ROWS, dtype="bfloat16")
        loaded = plainly_loaded(tmp_path / method)
        got, grid = error(loaded), Grid(32, symmetric, torch.bfloat16)
        with torch.no_grad():
            for name, weight in merged_tensors(model):
                kept = weight
                if weight.ndim == 2 and ".layers." in name:
                    kept = rounded(weight.float(), fit(weight.float(), grid), grid)
                loaded.get_parameter(name).copy_(kept)
        assert got < 1.15 * error(loaded), method


@pytest.mark.parametrize("family", list(FAMILIES))
def test_smoothing_changes_no_output(family, adapted):
    """AWQ's scales cancel. The next layer sees the same, and a scale in the wrong place would change everything."""
    model = adapted(family, **sizes_of(family))
    layers = Layers(model)
    layers.load(merged_tensors(model))
    layers.feed(ROWS)
    for number in range(2):
        fed, states = layers.inputs(number), [state.clone() for state in layers._states]
        layers.advance(number)
        want, layers._states = layers._states, states
        before = {name: weight.clone() for name, weight in layers.modules[number].named_parameters()}
        smooth(layers.modules[number], fed, layers.plain.config, Grid(32, False, torch.float32))
        after = dict(layers.modules[number].named_parameters())
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert {"mlp.down_proj.weight", "input_layernorm.weight"} <= changed
        again = {inputs.names: inputs.gram.clone() for inputs in fed}  # scaled along
        for inputs in layers.inputs(number):
            torch.testing.assert_close(again[inputs.names], inputs.gram, rtol=1e-3, atol=1e-3)
        layers.advance(number)
        for left, right, kept in zip(layers._states, want, layers._kept, strict=True):
            torch.testing.assert_close(left[kept], right[kept], atol=1e-3, rtol=1e-3)


def test_inputs_are_those_of_the_model(adapted):
    """The Gram matrices, beside hooks on the model itself, row by row."""
    model = adapted()
    layers = Layers(model)
    seen = {}

    def note(name):
        def hook(_, args):
            seen.setdefault(name, []).append(args[0][0].double())
        return hook

    base = model.get_base_model()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        base.model.layers[1].get_submodule(name).register_forward_pre_hook(note(name))
    for row in ROWS:
        logits(model, row)
    layers.load(merged_tensors(model))
    layers.feed(ROWS)
    layers.advance(0)
    found = {inputs.names[-1]: inputs for inputs in layers.inputs(1)}
    assert sorted(found) == ["mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj"]
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") in [inputs.names for inputs in found.values()]
    for name, rows in seen.items():
        x = torch.cat(rows)
        inputs = found["self_attn.v_proj" if name == "self_attn.q_proj" else name]
        torch.testing.assert_close(inputs.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.magnitude.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_outputs(adapted, tokenizer, tmp_path):
    """The report's output error of the first layer, from its inputs; and GPTQ and AWQ beat rounding."""
    model = adapted(num_hidden_layers=1)
    layers = Layers(model)
    merged = dict(merged_tensors(model))
    layers.load(merged.items())
    layers.feed(ROWS)
    fed = {name: inputs for inputs in layers.inputs(0) for name in inputs.names}
    got = {method: save_quantised(model, tokenizer, tmp_path / method, method, calibration=ROWS, dtype="float16")
           for method in ("awq", "gptq")}
    weights, _ = decompressed(tmp_path / "gptq")
    for name, inputs in fed.items():
        weight = merged[f"model.layers.0.{name}.weight"].float()
        kept = weights[f"model.layers.0.{name}.weight"].float()
        want = (output_error(kept - weight, inputs.gram) / output_error(weight, inputs.gram)) ** 0.5
        assert got["gptq"].output_errors[f"model.layers.0.{name}"] == pytest.approx(want, rel=1e-3)
        for method, symmetric in (("gptq", True), ("awq", False)):
            grid = Grid(got[method].settings["group"], symmetric, torch.float16)
            plain = rounded(weight, fit(weight, grid), grid)
            limit = (output_error(plain - weight, inputs.gram) / output_error(weight, inputs.gram)) ** 0.5
            if method == "gptq" or not name.endswith(("v_proj", "up_proj")):  # whose rows AWQ weighs otherwise
                assert got[method].output_errors[f"model.layers.0.{name}"] < limit, (method, name)


def test_quantised_bases_and_added_tokens(tokenizer, model, tmp_path):
    """From NF4, merged and quantised again; tied embeddings are written once, the list of stops is kept."""
    model("llama", **SIZES).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, own = load_model(str(tmp_path / "base"), load_in_4bit=True)
    loaded.generation_config.eos_token_id = [2, 0]
    adapted = shaken(add_lora(loaded, r=4))
    want = logits(adapted)
    save_quantised(adapted, own, tmp_path / "out", "gptq", calibration=ROWS)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    again = plainly_loaded(tmp_path / "out")
    assert again.generation_config.eos_token_id == [2, 0]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert (logits(again) - want).norm() / want.norm() < 0.15


def test_new_tokens_in_a_scaled_embedding(model, tokenizer, tmp_path):
    """Gemma 3's embedding has a scale beside its weight, behind the wrapper of the trained rows."""
    plain = model("gemma3", **SIZES)
    adapted = shaken(add_lora(plain, r=4, trainable_token_indices={"embed_tokens": [5, 9]}))
    with torch.no_grad():
        adapted.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].add_(0.1)
    merged = dict(merged_tensors(adapted))
    layers = Layers(adapted)
    layers.load(merged.items())
    layers.feed([torch.tensor([5, 9, 7])])
    want = []
    adapted.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: want.append(args[0]))
    logits(adapted, torch.tensor([5, 9, 7]))
    torch.testing.assert_close(layers._states[0], want[0])


def test_a_tensor_with_nan_is_named(adapted, tokenizer, tmp_path):
    for method, rows in (("fp8", None), ("awq", ROWS), ("gptq", ROWS), ("gptq", None)):
        model = adapted()
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight.data[3, 1] = torch.nan
        with pytest.raises(ModelError, match="not numbers") as caught:
            save_quantised(model, tokenizer, tmp_path / "out", method, calibration=rows)
        assert "model.layers.1.mlp.up_proj.weight" in caught.value.where
        assert list(tmp_path.iterdir()) == []
    model = adapted()
    model.get_base_model().model.norm.weight.data[0] = 1e6
    with pytest.raises(ModelError, match="too large for float16") as caught:
        save_quantised(model, tokenizer, tmp_path / "out", "fp8", dtype="float16")
    assert caught.value.where == "model.norm.weight"


def test_mistakes_come_before_work(adapted, model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="no such way"):
        save_quantised(adapted(), tokenizer, tmp_path / "out", "awk")
    with pytest.raises(OptionError, match="16 bits"):
        save_quantised(adapted(), tokenizer, tmp_path / "out", "fp8", dtype="float32")
    with pytest.raises(ModelError, match="cannot be kept in 4 bits") as caught:
        save_quantised(model("llama"), tokenizer, tmp_path / "out", "gptq", calibration=ROWS)
    assert "model.layers.0" in caught.value.where
    with pytest.raises(OptionError, match="no tokenizer"):
        save_quantised(adapted(), None, tmp_path / "out", "gptq", calibration="rows.jsonl")
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_experts=2,
        num_key_value_heads=1, moe_intermediate_size=32, num_experts_per_tok=1, head_dim=16))
    for method in ("fp8", "gptq"):
        with pytest.raises(ModelError, match="only linear layers"):
            save_quantised(experts, tokenizer, tmp_path / "out", method, calibration=ROWS)
    odd = adapted()
    odd.get_base_model().config.model_type = "oddity"
    with pytest.raises(ModelError, match="what comes before"):
        save_quantised(odd, tokenizer, tmp_path / "out", "awq", calibration=ROWS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="would be lost"):
        save_quantised(adapted(), tokenizer, tmp_path / "mine", "gptq", calibration=ROWS)
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    with pytest.raises(MissingDependencyError) as caught:
        save_quantised(adapted(), tokenizer, tmp_path / "out", "fp8")
    assert caught.value.fix == "pip install gazelle[vllm]"
    assert not (tmp_path / "out").exists()


def test_without_data_the_model_writes_its_own(adapted, tokenizer, tmp_path, monkeypatch):
    model = adapted().train()
    state = torch.get_rng_state()
    rows = own_text(model, tokenizer, rows=3, length=5)
    start = tokenizer("<|im_start|>user\n")["input_ids"]
    assert len(rows) == 3
    assert all(row[:len(start)].tolist() == start and len(row) == len(start) + 5 for row in rows)
    assert not torch.equal(rows[0], rows[1])
    assert all(map(torch.equal, rows, own_text(model, tokenizer, rows=3, length=5)))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    assert own_text(model, tokenizer, rows=1, length=2)[0][0] == tokenizer.bos_token_id
    monkeypatch.setattr("gazelle.export.quantised.own_text", functools.partial(own_text, rows=4, length=16))
    report = save_quantised(model, tokenizer, tmp_path / "out", "gptq")
    assert report.settings["calibration"] == "text that the model wrote"
    assert (report.settings["rows"], report.settings["tokens"]) == (4, 4 * 17)
