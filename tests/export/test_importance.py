"""What matters in each weight is measured as it is fed, and makes smaller errors where it counts."""

import ctypes

import numpy as np
import pytest
import torch
from tests import llama
from tests.models.families import adapt

from gazelle.base.errors import DataError, ModelError
from gazelle.data.calibration import calibration_ids
from gazelle.export.gguf import export_gguf
from gazelle.export.gguf_recipe import RECIPES
from gazelle.export.importance import measure_importance
from gazelle.facade.language_model import bind
from gazelle.models.gguf_file import read_gguf
from gazelle.models.swap import accelerate

TEXTS = [{"text": text * 3} for text in ("hello there, the cat sat on the mat; ", "def add(a, b):\n    return a + b\n",
                                        "x = {'a': [1, 2, 3]};\n", "and we see 1234 o'clock. ")]
ROWS = [torch.tensor([5, 300, 17, 42]), torch.tensor([8, 260, 99, 3, 77, 150, 201])]


def reference(model):
    """In float64, of what each linear layer is really called with, one row at a time."""
    seen = {}
    modules = {name: module for name, module in model.named_modules() if name.endswith(("proj", "lm_head"))
               and name.count("proj") < 2}
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
             for name, module in modules.items()]
    with torch.no_grad():
        for row in ROWS:
            model(row[None])
    for hook in hooks:
        hook.remove()
    return {f"{name}.weight": torch.cat(inputs).double().square().mean(0) for name, inputs in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_mean_squares_of_what_layers_are_fed(family, model):
    plain = model(family)
    want = reference(plain)
    found = measure_importance(plain, ROWS)
    assert found.keys() == want.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), want[name], rtol=1e-6, atol=0)


def test_an_adapter_counts_and_the_engine_makes_no_difference(model):
    adapted = adapt(model("llama")).eval()
    want = {name.removeprefix("base_model.model."): values for name, values in reference(adapted).items()}
    plain = measure_importance(adapted.get_base_model(), ROWS)
    accelerate(adapted)
    adapted.train()
    found = measure_importance(adapted, ROWS)
    assert all(module.training for module in adapted.modules()), "modes are as they were"
    assert found.keys() == want.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), want[name], rtol=1e-5, atol=0)
    with adapted.disable_adapter():
        without = measure_importance(adapted, ROWS)
    assert not torch.allclose(without["lm_head.weight"], plain["lm_head.weight"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_with_an_adapter_and_layers_trained_in_full(model):
    adapted = adapt(model("llama", tied=False), targets=["embed_tokens", "lm_head"],
                    modules_to_save=["down_proj"]).eval()
    want = reference(adapted.get_base_model())
    found = measure_importance(adapted, ROWS)
    assert found.keys() == want.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), want[name], rtol=1e-6, atol=0)


def weighed(model, tokenizer, folder, method, **options):
    return export_gguf(model, tokenizer, folder, method, calibration=TEXTS, **options)[0]


@pytest.mark.parametrize("method", ["q2_k", "q3_k_m", "q4_k_m", "q4_0"])
def test_errors_are_smaller_where_they_count(method, model, tokenizer, tmp_path):
    """Of what a layer gives, by the measure that is made smaller: errors weighed by the column's mean square."""
    plain = model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8,
                  head_dim=32, tied=False)
    with torch.no_grad():  # some columns matter much more than others, as in real models
        for layer in plain.model.layers:
            layer.input_layernorm.weight.mul_(torch.logspace(-1, 1, 256)[torch.randperm(256)])
    importance = measure_importance(plain, calibration_ids(TEXTS, tokenizer))
    paths = export_gguf(plain, tokenizer, tmp_path / "plain", method)[0], \
        weighed(plain, tokenizer, tmp_path / "weighed", method)
    name = "model.layers.1.self_attn.v_proj.weight"
    kind, errors = {}, []
    for path in paths:
        file = read_gguf(path)
        kind[path] = file.tensors["blk.1.attn_v.weight"].kind
        error = file.read("blk.1.attn_v.weight") - dict(plain.named_parameters())[name].detach().numpy()
        errors.append(float((error**2 * importance[name].numpy()).sum()))
    assert len(set(kind.values())) == 1
    assert errors[1] < 0.9 * errors[0]
    fields = read_gguf(paths[1]).metadata
    assert fields["quantize.imatrix.entries_count"] == 2 * 7 + 1 and fields["quantize.imatrix.chunks_count"] == 4
    assert fields["quantize.imatrix.dataset"] == "list" and "quantize.imatrix.file" in fields
    with llama.Llama(paths[1]) as loaded:
        assert np.isfinite(loaded.logits([5, 300, 17])).all()


class Matrix(ctypes.Structure):
    """`llama_model_imatrix_data` of llama.h."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


@pytest.mark.parametrize("method", ["q4_0", "q5_0", "q3_k_m", "q4_k_s", "q2_k"])
def test_formats_are_those_of_llama_cpp_with_an_importance_matrix(method, model, tokenizer, tmp_path):
    """And so are errors, weighed with the same matrix."""
    plain = model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8,
                  head_dim=32, tied=False, num_hidden_layers=17).half().float()
    measured = measure_importance(plain, calibration_ids(TEXTS, tokenizer))
    source, = export_gguf(plain, tokenizer, tmp_path / "whole", "f32")
    ours = read_gguf(weighed(plain, tokenizer, tmp_path / "ours", method))
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    entries = {"output.weight" if name == "lm_head.weight" else
               f"blk.{name.split('.')[2]}.{names[name.split('.')[-2]]}.weight": values.contiguous()
               for name, values in measured.items()}
    table = (Matrix * (len(entries) + 1))(*(Matrix(name.encode(), values.data_ptr(), len(values))
                                            for name, values in entries.items()), Matrix())
    llama.quantize(source, tmp_path / "theirs.gguf", RECIPES[method].file_type, ctypes.addressof(table))
    theirs = read_gguf(tmp_path / "theirs.gguf")
    assert {name: entry.kind for name, entry in ours.tensors.items()} == \
        {name: entry.kind for name, entry in theirs.tensors.items()}
    weights = {name: read_gguf(source).read(name).astype(np.float64) for name in entries}
    for name, values in entries.items():
        left, right = (float(((file.read(name) - weights[name]) ** 2 * values.numpy()).sum())
                       for file in (ours, theirs))
        assert left <= 1.02**2 * right, name


def test_where_it_changes_nothing_nothing_is_measured(model, tokenizer, tmp_path, caplog):
    path, = bind(model("llama")).save_pretrained_gguf(str(tmp_path), tokenizer, "f16", calibration="not there.jsonl")
    assert "calibration changes nothing in f16" in caplog.text
    assert "quantize.imatrix.file" not in read_gguf(path).metadata


def test_data_that_cannot_be_read_comes_before_any_file(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        export_gguf(model("llama"), tokenizer, tmp_path / "out", "q4_0", calibration="not there.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_fed_no_numbers_is_named(model):
    broken = model("llama")
    with torch.no_grad():
        broken.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite") as caught:
        measure_importance(broken, ROWS)
    assert "layers.1.self_attn" in caught.value.where
