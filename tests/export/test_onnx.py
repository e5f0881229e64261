"""Exported to ONNX and run by onnxruntime, a model computes what transformers computes, with its cache and without."""

import errno
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from tests.models.families import FAMILIES, adapt, make, quantized

from gazelle.base.errors import MissingDependencyError, ModelError, OptionError, OutputError
from gazelle.export import onnx as export
from gazelle.export.onnx import export_onnx, trtexec_command
from gazelle.facade.language_model import bind

ort = pytest.importorskip("onnxruntime")
ALWAYS = ("gemma3",)  # norms everywhere, two windows and two sets of frequencies; tracing takes seconds each time


class Session:
    """A file in onnxruntime, with its cache."""

    def __init__(self, path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.names = [name for name in self.inputs if name.startswith("past")]
        self.dtype = np.float16 if "float16" in self.inputs[self.names[0]].type else np.float32

    def run(self, ids, mask, positions, past=None):
        """Logits, and the cache with these tokens."""
        if past is None:
            _, heads, _, size = self.inputs[self.names[0]].shape
            past = dict.fromkeys(self.names, np.zeros((len(ids), heads, 0, size), self.dtype))
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past
        outputs = [entry.name for entry in self.session.get_outputs()]
        assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in self.names)]
        logits, *present = self.session.run(None, feed)
        return logits, dict(zip(self.names, present, strict=True))


def batch(rows, length, padded, vocabulary=97):
    """Random ids of which the first row begins with `padded` tokens of padding."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def compare(path, model, length=9, tolerance=1e-4, vocabulary=97):
    """All at once; and the first part, then token by token, with the cache. Returns the largest error."""
    session = Session(path)
    worst = 0.0
    for rows, padded in ((1, 0), (2, 3)):
        ids, mask, positions = batch(rows, length, padded, vocabulary)
        with torch.no_grad():
            want = model(ids, attention_mask=mask, position_ids=positions).logits.float().numpy()
        ids, mask, positions = ids.numpy(), mask.numpy(), positions.numpy()
        whole, _ = session.run(ids, mask, positions)
        begin = length - 3
        parts, past = session.run(ids[:, :begin], mask[:, :begin], positions[:, :begin])
        parts = [parts]
        for at in range(begin, length):
            new = slice(at, at + 1)
            logits, past = session.run(ids[:, new], mask[:, :at + 1], positions[:, new], past)
            parts.append(logits)
        assert all(tensor.shape[2] == length for tensor in past.values())
        for got in (whole, np.concatenate(parts, 1)):
            error = np.abs(got - want)[mask.astype(bool)].max()
            worst = max(worst, error)
            assert error <= tolerance * max(1, np.abs(want).max()), (rows, error)
    return worst


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
                                    for name in FAMILIES])
def test_logits_are_those_of_transformers(family, tmp_path):
    model = make(family, 1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 **({"hidden_size": 64} if family == "phi3" else {"hidden_size": 64, "rope_parameters": {
                     "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
                     "long_factor": [2.0, 2.1, 2.2, 2.3], "original_max_position_embeddings": 7,
                     "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 7}
                    if family == "phi4-mini" else {})).eval()
    path, = export_onnx(model, tmp_path / "m.onnx")
    if family == "phi4-mini":  # its cache holds keys of the frequencies that were in force: compared without one
        session, (ids, mask, positions) = Session(path), batch(2, 9, 3)
        for length in (5, 9):  # within the original context, and beyond it
            with torch.no_grad():
                short, seen, at = (part[:, :length] for part in (ids, mask, positions))
                want = model(short, attention_mask=seen, position_ids=at).logits
            got, _ = session.run(short.numpy(), seen.numpy(), at.numpy())
            np.testing.assert_allclose(got[seen.bool().numpy()], want.numpy()[seen.bool().numpy()], atol=1e-4)
    else:
        compare(path, model)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A quantised model with an adapter, and the file that was made of it."""
    folder = tmp_path_factory.mktemp("onnx")
    model = quantized(folder / "base", load_in_4bit=True).eval()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("gazelle")
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.INFO)
    files = bind(model).export_onnx(str(folder / "out" / "m.onnx"))
    logger.setLevel(level)
    logger.removeHandler(handler)
    return model, files, records


def test_an_adapter_on_quantised_weights_is_merged(adapted):
    from gazelle.adapters.merge import merged_tensors

    model, (path,), _ = adapted
    plain = make("llama", 24, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=32).eval()
    plain.load_state_dict({name: tensor.float() for name, tensor in merged_tensors(model)})
    compare(path, plain)
    assert model.peft_config, "the model is what it was"


def test_sizes_are_free_and_named(adapted):
    session = Session(adapted[1][0])
    assert session.inputs["input_ids"].shape == ["batch_size", "sequence_length"]
    assert session.inputs["attention_mask"].shape[1] not in ("sequence_length", 7)
    assert session.inputs["past_key_values.1.value"].shape == ["batch_size", 1, "past_sequence_length", 32]
    import onnx

    onnx.checker.check_model(str(adapted[1][0]), full_check=True)


def test_the_line_for_tensorrt(adapted):
    model, (path,), records = adapted
    script = path.with_name("m.onnx.trtexec.sh")
    assert any(str(script) in record for record in records)
    line = script.read_text().strip()
    assert line == f"#!/bin/sh\nexec {trtexec_command('m.onnx', model.config)}"
    assert os.access(script, os.X_OK)
    parts = dict(part.split("=", 1) for part in line.split("trtexec ")[1].split())
    session = Session(path)
    for kind, (rows, new, cached) in {"min": (1, 1, 0), "opt": (1, 128, 31), "max": (8, 512, 127)}.items():
        shapes = dict(entry.split(":") for entry in parts[f"--{kind}Shapes"].split(","))
        assert shapes.keys() == session.inputs.keys()
        assert shapes["attention_mask"] == f"{rows}x{new + cached}"
        assert shapes["past_key_values.1.key"] == f"{rows}x1x{cached}x32"
    assert parts["--onnx"] == "m.onnx" and parts["--saveEngine"] == "m.engine"


def test_weights_beside_the_graph(adapted, tmp_path, monkeypatch):
    """Written three times: new weights never have the name of those that the earlier graph needs."""
    import onnx_ir

    model, (path,), _ = adapted
    traced = type("Program", (), {"model": onnx_ir.load(path)})
    monkeypatch.setattr(export, "_traced", lambda *_: traced)
    monkeypatch.setattr(export, "_INLINE", 1000)
    want = Session(path).run(*(part.numpy() for part in batch(2, 9, 3)))[0]
    for data in ("m.onnx.data", "m.onnx.2.data", "m.onnx.data"):
        files = export_onnx(model, tmp_path / "m.onnx")
        assert [file.name for file in files] == ["m.onnx", data]
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["m.onnx", data, "m.onnx.trtexec.sh"])
        assert files[0].stat().st_size < path.stat().st_size - files[1].stat().st_size / 2
        np.testing.assert_array_equal(Session(files[0]).run(*(part.numpy() for part in batch(2, 9, 3)))[0], want)


@pytest.mark.slow
def test_half_precision(tmp_path):
    model = make("llama", 3).eval()
    path, = export_onnx(model, tmp_path / "m.onnx", dtype="float16")
    assert Session(path).dtype == np.float16
    compare(path, model, tolerance=2e-2)


@pytest.mark.slow
def test_the_demo_model(demo_model, demo_tokenizer, tmp_path):
    model = demo_model().eval()
    path, = export_onnx(model, tmp_path / "m.onnx")
    print(f"largest error {compare(path, model, 40, 1e-3 / 40, len(demo_tokenizer)):.2e}")


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A place with an earlier export, and no tracing, which takes seconds."""
    (tmp_path / "m.onnx").write_bytes(b"an earlier export")
    monkeypatch.setattr(export, "_traced", lambda *_: type("Program", (), {"model": None}))
    return tmp_path


def untouched(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()} == {"m.onnx": b"an earlier export"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_breaks_off_changes_nothing(error, earlier, monkeypatch):
    import onnx_ir

    def failing(_, path, **__):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_ir, "save", failing)
    with pytest.raises((KeyboardInterrupt, OutputError), match=r"cannot be written|^$"):
        export_onnx(make("llama", 1), earlier / "m.onnx")
    assert untouched(earlier)


def test_what_is_refused_before_anything_is_traced(earlier, monkeypatch):
    monkeypatch.setattr(export, "_traced", None)
    model = make("llama", 1)
    with pytest.raises(OptionError, match="dtype"):
        export_onnx(model, earlier / "m.onnx", dtype="bfloat16")
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ModelError, match="dynamic"):
        export_onnx(model, earlier / "m.onnx")
    model.config.rope_parameters["rope_type"] = "default"
    model.config.model_type = "gpt_bigcode"
    with pytest.raises(ModelError, match="gpt_bigcode"):
        export_onnx(model, earlier / "m.onnx")
    with torch.no_grad():
        (broken := make("llama", 1)).model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    with pytest.raises(ModelError, match="not numbers") as caught:
        export_onnx(broken, earlier / "m.onnx")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.where
    with pytest.raises(OutputError, match="runs through a file"):
        export_onnx(make("llama", 1), earlier / "m.onnx" / "m.onnx")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="disk space"):
        export_onnx(make("llama", 1), earlier / "m.onnx")
    assert untouched(earlier)


def test_without_the_package(earlier, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"gazelle\[onnx\]"):
        export_onnx(make("llama", 1), earlier / "m.onnx")
    assert untouched(earlier)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("target", "same"), [("q_proj", True), ("lm_head", False)])
def test_a_tied_head_is_written_once_and_an_adapter_on_it_unties_it(target, same, earlier, monkeypatch):
    seen = {}
    monkeypatch.setattr(export, "_write", lambda *_, **__: [])
    monkeypatch.setattr(export, "_traced", lambda model, *_: seen.update(model=model.model))
    model = adapt(make("llama", 1), targets=[target]).eval()
    export_onnx(model, earlier / "m.onnx")
    plain = seen["model"]
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == same
    ids = torch.tensor([[5, 30, 17]])
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
