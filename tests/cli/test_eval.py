"""`gazelle eval` and `gazelle rate`, on a tiny model with the demo's tokenizer."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.llama import FOLDER, library
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.export.gguf import export_gguf
from gazelle.facade.evaluating import LlamaModel, find_model, named_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(demo_tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(demo_tokenizer), max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=demo_tokenizer.eos_token_id, pad_token_id=demo_tokenizer.pad_token_id))


@pytest.fixture
def here(model: LlamaForCausalLM, demo_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a checkpoint, another one, and test cases."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("base")
    demo_tokenizer.save_pretrained("base")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained("other")
    demo_tokenizer.save_pretrained("other")
    Path("cases.jsonl").write_text("".join(json.dumps({"input": f"What is {number}?", "expected": f"It is {number}."})
                                           + "\n" for number in range(5)))
    return tmp_path


def test_two_models_are_compared_and_rated(here: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["eval", "base", "tuned=other", "--cases", "cases.jsonl", "--metrics", "accuracy,token_f1,perplexity",
                 "--output", "out/eval", "--max-new-tokens", "4", "--judge", "other"]) == 0
    printed = capsys.readouterr().out
    assert "|  | base | tuned |" in printed and "## Beside base" in printed and "out/eval/evaluation.html" in printed
    content = json.loads(Path("out/eval/evaluation.json").read_text())
    assert "judge" in content["models"]["base"]["overall"]
    assert list(content["models"]) == ["base", "tuned"] and content["settings"]["test_cases"] == "cases.jsonl"

    monkeypatch.setattr("sys.stdin", io.StringIO("a\nwhat?\nT\n"))
    assert main(["rate", "out/eval", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "to rate: 5, rated before: 0" in printed and "ties: 1" in printed and "sign test: p = 1" in printed
    assert "tuned" not in printed.split("base better")[0].split("\n", 1)[1]  # nobody is told whose answer it is
    assert len(Path("out/eval/votes.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("b\ns\nq\n"))
    assert main(["rate", "out/eval"]) == 0
    printed = capsys.readouterr().out
    assert "to rate: 3, rated before: 2" in printed and "[2/3]" in printed and "skipped: 1" in printed
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["rate", "out/eval", "--models", "base,tuned"]) == 0
    assert "to rate: 1, rated before: 4" in capsys.readouterr().out
    assert main(["rate", "nowhere"]) == 2
    assert main(["rate", "out/eval", "--models", "base"]) == 2


def test_an_answer_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"a1": {}, "b1": {}}, "cases": [
        {"messages": [{"role": "user", "content": "[bold]q"}], "answers": {"a1": "\x1b[2Jgone\x9b1m", "b1": ""}}]}))
    monkeypatch.setattr("sys.stdin", io.StringIO("tie\n"))
    assert main(["rate", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x9b" not in printed
    assert "[2Jgone" in printed and "[bold]q" in printed and "(nothing)" in printed


def test_a_gguf_file_answers_in_the_real_llama_cpp(here: Path, model: Any, demo_tokenizer: Any,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    library()
    path, = export_gguf(model, demo_tokenizer, here / "gguf", "f32")
    assert main(["eval", "other", f"gguf={path}", "--cases", "cases.jsonl", "--llama", str(FOLDER), "--output", "out",
                 "--metrics", "exact_match,perplexity,first_token,latency,peak_memory", "--max-new-tokens", "6",
                 "--timed-cases", "2"]) == 0
    content = json.loads(Path("out/evaluation.json").read_text())
    ours, theirs = (content["models"][name] for name in ("other", "gguf"))
    assert theirs["runs_on"].startswith(f"llama.cpp ({FOLDER.resolve()}")
    for case in content["cases"]:
        assert case["answers"]["gguf"] == case["answers"]["other"]
        assert case["scores"]["gguf"]["perplexity"] == pytest.approx(case["scores"]["other"]["perplexity"], rel=2e-3)
    assert theirs["overall"]["latency"]["count"] == 2
    assert 0 < theirs["overall"]["first_token"]["value"] <= theirs["overall"]["latency"]["value"]
    assert theirs["overall"]["peak_memory"]["value"] > path.stat().st_size
    assert ours["overall"]["perplexity"]["value"] > 1


def test_without_llama_cpp_gazelle_reads_the_file(here: Path, model: Any, demo_tokenizer: Any,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path, = export_gguf(model, demo_tokenizer, here / "gguf", "f32")
    monkeypatch.setattr("gazelle.facade.evaluating.find_library", lambda _: None)
    assert main(["eval", str(path), "--cases", "cases.jsonl", "--metrics", "exact_match", "--output", "out",
                 "--max-new-tokens", "2"]) == 0
    content = json.loads(Path("out/evaluation.json").read_text())
    assert content["models"]["model-F32.gguf"]["runs_on"].startswith("gazelle on cpu")
    with pytest.raises(Exception, match="no such file"):
        LlamaModel(here / "none.gguf", here)


TASK = """
task: crates
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_lm_eval_from_local_files(here: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here / "datasets"))
    rows = [{"question": f"{number}?", "choices": [" red", " blue", " some other crate"], "answer": number % 3}
            for number in range(6)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks").mkdir()
    Path("tasks/crates.yaml").write_text(TASK.format(data=here / "data.jsonl"))
    assert main(["eval", "base", "other", "--tasks", "crates", "--include-path", "tasks", "--output", "out"]) == 0
    content = json.loads(Path("out/tasks.json").read_text())
    scores = {score["model"]: score for score in content["scores"] if score["metric"] == "acc"}
    assert scores["base"]["count"] == 6 and scores["base"]["error"] > 0

    # The same by hand: the likeliest choice after each question.
    tokenizer, model = find_model("base"), None
    tokenizer.open()
    model, tokens = tokenizer.model, tokenizer.tokenizer  # type: ignore[attr-defined]
    right = 0
    for row in rows:
        prompt = tokens(f"Question: {row['question']}\nAnswer:")["input_ids"]
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = tokens(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) + at - 1, token]) for at, token in enumerate(ids)))
        right += sums.index(max(sums)) == row["answer"]
    assert scores["base"]["value"] == pytest.approx(right / 6)
    assert "| crates | acc | 6 |" in capsys.readouterr().out
    assert main(["eval", "base", "--tasks", "crate", "--include-path", "tasks"]) == 2
    assert main(["eval", "http://127.0.0.1:9/v1#x", "--tasks", "crates", "--include-path", "tasks"]) == 2


@pytest.mark.parametrize(("arguments", "said"), [
    (["base"], "neither --cases nor --tasks"), (["base", "--cases", "cases.jsonl", "--tasks", "x"], "both"),
    (["base", "--cases", "csaes.jsonl"], "did you mean"), (["./basis", "--cases", "cases.jsonl"], "no such model"),
    (["a=base", "a=other", "--cases", "cases.jsonl"], "one name"), (["a=", "--cases", "cases.jsonl"], "no place"),
    (["base", "--cases", "cases.jsonl", "--metrics", "blue"], "did you mean 'bleu'"),
    (["base", "--cases", "cases.jsonl", "--metrics", "judge"], "no judge"),
    (["base", "--cases", "cases.jsonl", "--metrics", "key_coverage"], "needs 'keys'"),
    (["http://x/v1#m", "--cases", "cases.jsonl", "--api-key-env", "GAZELLE_NO_KEY"], "not set"),
    (["base", "--cases", "cases.jsonl", "--output", "cases.jsonl/out"], "runs through a file"),
    (["x.gguf", "--cases", "cases.jsonl", "--llama", "."], "llama.cpp is not there"),
    (["base", "--cases", "cases.jsonl", "--limit", "3"], "would do nothing"),
    (["base", "--tasks", "x", "--judge", "base"], "would do nothing"),
    (["http://x/v1?key=hunter2#m", "--cases", "cases.jsonl"], "with a query"),
])
def test_mistakes(here: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"base", "other", "cases.jsonl"}


@pytest.mark.parametrize("second", ["out/none", "http://127.0.0.1:9/v1#x"])
@pytest.mark.parametrize("option", ["", "--judge="])
def test_a_model_that_is_not_there_is_told_of_before_any_is_asked(
        here: Path, second: str, option: str, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was asked")

    monkeypatch.setattr("gazelle.evaluate.answerers.LocalModel.ask", ask)
    assert main(["eval", "base", f"{option}{second}" if option else f"second={second}", "--cases",
                 "cases.jsonl"]) == 2
    assert second.partition("#")[0] in capsys.readouterr().err


def test_without_lm_eval_it_is_named(here: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "base", "--tasks", "x"]) == 2
    assert "pip install gazelle[lm-eval]" in capsys.readouterr().err


def test_names() -> None:
    assert named_models(["out/lora", "a=b/c", "http://h:1/v1#m=1", "http://h/v1", "x=y.gguf"]) == {
        "lora": "out/lora", "a": "b/c", "m=1": "http://h:1/v1#m=1", "http://h/v1": "http://h/v1", "x": "y.gguf"}
    with pytest.raises(OptionError):
        named_models(["lora", "out/lora"])
