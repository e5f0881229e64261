"""Verification asks the real consumers, finds nothing wrong with sound exports, and finds what is wrong with others."""

import json
import sys

import numpy as np
import pytest
import torch
from tests.llama import FOLDER, library
from tests.models.families import adapt

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.export.consumers import hf
from gazelle.export.consumers import llama as llama_consumer
from gazelle.export.gguf import export_gguf
from gazelle.export.verify import ConsumerError, compare, run_consumer, verify
from gazelle.export.verify_probe import ask_model, make_probe
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models.save import save_merged

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = "".join(json.dumps({"instruction": f"add {n} and the cat", "output": f"the cat sat on {n}"}) + "\n"
               for n in range(5))


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    folder = tmp_path / "base"
    save_merged(model("llama"), tokenizer, folder, dtype="float32")
    return folder


def probe_of(tokenizer, stops=(2,), rows=()):
    return make_probe(tokenizer, list(rows), "", stops=list(stops))


def by_name(verified):
    return {check.name: check for check in verified.checks}


def test_a_run_is_exported_and_verified_on_its_rows(checkpoint, tmp_path, capsys):
    library()
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(str(tmp_path / "run"))
    tokenizer.save_pretrained(str(tmp_path / "run"))
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["export", str(tmp_path / "run"), "--to", "gguf:f32,q8_0", "--to", "merged:lora", "--verify", "--llama",
                 str(FOLDER), "--data", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "gguf:f32,q8_0" in printed and "rows.jsonl" in printed and "WRONG" not in printed
    assert "3 of 3 exports were read back" in printed
    found = json.loads((tmp_path / "run-gguf" / "model-F32.verification.json").read_text())
    checks = {check["name"]: check["values"] for check in found["checks"]}
    assert found["consumer"].startswith("llama.cpp (") and found["wrong"] == []
    assert checks["token ids"]["same"] == checks["token ids"]["of"] > 25
    assert checks["template"]["same"] == checks["greedy answers"]["same"] == 5
    assert checks["error of logits"]["largest"] < 2e-2  # keys and values are kept in float16
    assert checks["perplexity"]["in_memory"] == pytest.approx(checks["perplexity"]["export"], rel=1e-3)
    eight = json.loads((tmp_path / "run-gguf" / "model-Q8_0.verification.json").read_text())
    assert next(c for c in eight["checks"] if c["name"] == "error of logits")["values"]["largest"] \
        > checks["error of logits"]["largest"]
    adapter = json.loads((tmp_path / "run-merged-lora" / "verification.json").read_text())
    checks = {check["name"]: check["values"] for check in adapter["checks"]}
    assert adapter["consumer"].startswith("transformers ") and adapter["wrong"] == []
    assert checks["error of logits"]["largest"] < 1e-4
    assert checks["greedy answers"]["same"] == 5


def test_a_merged_model_in_plain_transformers(model, tokenizer, tmp_path):
    adapted = adapt(model("llama")).eval()
    probe = probe_of(tokenizer)
    reference = ask_model(adapted, probe)
    save_merged(adapted, tokenizer, tmp_path / "out", dtype="float32")
    given, logits = hf.answer(probe.request() | {"path": str(tmp_path / "out")})
    checks = {check.name: check for check in compare(probe, reference, given, logits)}
    assert checks["error of logits"].values["largest"] < 1e-4
    assert checks["token ids"].ok and checks["template"].ok and checks["stop tokens"].ok


def test_a_model_in_16_bits_is_asked_in_float32_and_left_as_it_was(model, tokenizer):
    import copy

    plain = model("llama").bfloat16()
    weights = {name: weight.data_ptr() for name, weight in plain.named_parameters()}
    probe = probe_of(tokenizer)
    reference = ask_model(plain, probe)
    assert {name: weight.data_ptr() for name, weight in plain.named_parameters()} == weights
    assert plain.dtype == torch.bfloat16
    wide = ask_model(copy.deepcopy(plain).float(), probe)
    np.testing.assert_array_equal(reference.logits, wide.logits)


def test_what_is_wrong_is_found(model, tokenizer, tmp_path):
    """Another template, another head, an end that the export goes on after."""
    import copy

    library()
    plain = model("llama")
    probe = probe_of(tokenizer)
    reference = ask_model(plain, probe)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("assistant\\n", "assistant\\n ")
    broken = copy.deepcopy(plain)
    with torch.no_grad():
        broken.model.norm.weight.mul_(-3)
    path, = export_gguf(broken, other, tmp_path, "f32")
    verified = verify(path, "gguf", probe_of(tokenizer, stops=(2, 99)), reference, tokenizer, llama=str(FOLDER))
    assert verified.wrong == ["template", "stop tokens", "perplexity"]
    assert by_name(verified)["stop tokens"].values["missed"] == [99]
    sound = verify(export_gguf(plain, tokenizer, tmp_path, "f32")[0], "gguf", probe, reference, tokenizer,
                   llama=str(FOLDER))
    assert sound.wrong == []


def test_other_ids_are_found(model, tokenizer):
    probe = probe_of(tokenizer)
    reference = ask_model(model("llama"), probe)
    same = reference.given | {"texts": probe.text_ids, "chats": probe.prompts[:len(probe.chats)], "ends": [2]}
    assert not [check for check in compare(probe, reference, same, reference.logits) if check.ok is False]
    shifted = same | {"texts": [probe.text_ids[0], *[ids[1:] for ids in probe.text_ids[1:]]]}
    ids = compare(probe, reference, shifted, reference.logits)[0]
    assert not ids.ok and ids.values["first_wrong"] == 1
    for factor, whole, right in ((1.3, False, True), (1.3, True, False), (1 / 1.3, True, False), (1.01, True, True),
                                 (1.6, False, False)):
        off = same | {"logprobs": [[value - np.log(factor) for value in row] for row in same["logprobs"]]}
        checks = {check.name: check for check in compare(probe, reference, off, reference.logits, whole=whole)}
        assert checks["perplexity"].ok is right, (factor, whole)
    broken = reference.logits.copy()
    broken[0, 0] = np.nan
    assert next(check for check in compare(probe, reference, same, broken) if "logits" in check.name).ok is False


def test_without_llama_cpp_it_says_so(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["export", str(checkpoint), "--to", "gguf:q8_0", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "llama.cpp is not installed" in printed and "--llama" in printed
    assert "0 of 1 exports were read back" in printed
    assert "a few built-in prompts" in printed
    with pytest.raises(OptionError, match=r"llama.cpp is not there"):
        llama_consumer.find_library(str(tmp_path))
    assert main(["export", str(checkpoint), "--to", "gguf:q8_0", "--verify", "--llama", str(tmp_path)]) == 2
    assert "an unpacked release" in capsys.readouterr().err


def test_llama_cpp_is_found_beside_its_programs(tmp_path, monkeypatch):
    (tmp_path / "prefix" / "lib").mkdir(parents=True)
    (tmp_path / "prefix" / "bin").mkdir()
    program, file = tmp_path / "prefix" / "bin" / "llama-cli", tmp_path / "prefix" / "lib" / "libllama.so.0"
    program.touch(mode=0o755)
    file.touch()
    monkeypatch.setattr(llama_consumer, "_SUFFIX", ".so")
    monkeypatch.setenv("PATH", str(program.parent))
    assert llama_consumer.find_library() == file
    assert llama_consumer.find_library(str(file)) == file


def test_a_consumer_that_crashes_or_refuses_is_a_finding(model, tokenizer, tmp_path):
    with pytest.raises(ConsumerError, match="-9"):
        run_consumer([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {})
    with pytest.raises(ConsumerError, match="ended with 1: ZeroDivisionError"):
        run_consumer([sys.executable, "-c", "1 / 0"], {})
    library()
    (tmp_path / "m.gguf").write_bytes(export_gguf(model("llama"), tokenizer, tmp_path, "f32")[0].read_bytes()[:-4000])
    probe = probe_of(tokenizer)
    found = llama_consumer.find_library(str(FOLDER))
    request = probe.request() | {"path": str(tmp_path / "m.gguf"), "library": str(found)}
    with pytest.raises(ConsumerError, match="cannot load the file"):
        run_consumer([sys.executable, "-m", "gazelle.export.consumers", "llama"], request)


def test_prompts_are_cut_where_training_labels_begin(tokenizer):
    from gazelle.data.formats import to_conversations
    from gazelle.data.read import read_rows

    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
             {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    probe = make_probe(tokenizer, to_conversations(read_rows([{"messages": turns}])), "rows", stops=[2])
    asked = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert probe.prompts == [asked] and probe.chats == [turns[:3]]
    row = probe.rows[0]
    assert tokenizer.decode([row["ids"][at + 1] for at in row["at"]]) == "two<|im_end|>four<|im_end|>"
