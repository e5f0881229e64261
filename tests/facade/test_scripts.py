"""Scripts as people have them, run unchanged on a tiny model, and what the hook lets them see."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.cli.run import leading_stand_ins
from gazelle.facade.scripts.imports import NotThereError, standing_in
from gazelle.facade.scripts.names import INSTEAD, MODULES
from gazelle.facade.scripts.run import parse_names, run_script

SCRIPTS = Path(__file__).parent.parent / "scripts"
# Script -> hub names it asks for, and the files that it is to leave.
CASES: dict[str, tuple[str, tuple[str, str], list[str]]] = {
    "alpaca": ("unsloth/llama-3-8b-bnb-4bit", ("yahma/alpaca-cleaned", "rows.jsonl"),
               ["lora_model/adapter_model.safetensors", "lora_model/tokenizer.json", "outputs/report.html"]),
    "sharegpt_chat": ("unsloth/Qwen2.5-0.5B-Instruct", ("mlabonne/FineTome-100k", "chats.jsonl"),
                      ["model/model.safetensors", "model/config.json", "model/chat_template.jinja"]),
    "continued_pretraining": ("unsloth/mistral-7b-v0.3-bnb-4bit", ("roneneldan/TinyStories", "stories.txt"),
                              ["lora_model/adapter_model.safetensors"]),
    "domain_tokens": ("unsloth/Phi-3-mini-4k-instruct", ("", ""), ["tokens_model/adapter_model.safetensors"]),
    "responses_only": ("unsloth/Qwen3-0.6B", ("mlabonne/FineTome-100k", "chats.jsonl"),
                       ["lora/adapter_model.safetensors"]),
    "merge_and_gguf": ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", ("", ""),
                       ["merged/model.safetensors", "gguf/model-Q8_0.gguf", "gguf16/model-F16.gguf"]),
    "plain_trl": ("meta-llama/Llama-3.2-1B", ("trl-lib/Capybara", "chats.jsonl"), ["out/adapter_model.safetensors"]),
    "curriculum": ("unsloth/Meta-Llama-3.1-8B", ("yahma/alpaca-cleaned", "rows.jsonl"),
                   ["curriculum_model/adapter_model.safetensors", "outputs/replay.json"]),
    "dynamic_length": ("unsloth/tinyllama", ("yahma/alpaca-cleaned", "rows.jsonl"),
                       ["dynamic_model/adapter_model.safetensors"]),
    "distillation": ("unsloth/SmolLM2-135M", ("yahma/alpaca-cleaned", "rows.jsonl"),
                     ["student_model/adapter_model.safetensors"]),
    "columns_to_chat": ("unsloth/gemma-2b", ("vicgalle/alpaca-gpt4", "rows.jsonl"),
                        ["lora_model/adapter_model.safetensors"]),
}


def run(script: str, model: Path, data: Path, arguments: tuple[str, ...] = ()) -> int:
    name, (dataset, file), _ = CASES[script]
    stand_ins = ["--model", f"{name}={model}", *(["--dataset", f"{dataset}={data / file}"] if dataset else [])]
    return main(["run", str(SCRIPTS / f"{script}.py"), *stand_ins, *arguments])


@pytest.fixture(params=CASES)
def ran(request: pytest.FixtureRequest, tiny_checkpoint: Path, script_data: Path, tmp_path: Path, one_thread: None,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The name of a script that ran in the present folder, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = run(request.param, tiny_checkpoint, script_data,
               ("--output", "out") if request.param == "plain_trl" else ())
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return request.param, printed.out


@pytest.mark.filterwarnings("ignore")  # those of a script are its author's
def test_scripts_run_unchanged(ran: tuple[str, str], demo_tokenizer: object) -> None:
    script, printed = ran
    for name in CASES[script][2]:
        assert Path(name).stat().st_size > 0, name
    if script == "responses_only":
        # A user who writes a header of the assistant does not fool it: the turns lie beside the text.
        assert "learnt: 'Mrs. Okonkwo runs it.<|im_end|>Since 1987.<|im_end|>'" in printed
    elif script == "continued_pretraining":
        assert "learning rates [5e-06, 5e-05]" in printed
        with safe_open("lora_model/adapter_model.safetensors", "pt") as file:
            assert any("embed_tokens" in name for name in file.keys())  # noqa: SIM118
    elif script == "domain_tokens":
        tokenizer = AutoTokenizer.from_pretrained("tokens_model")
        assert tokenizer.tokenize("<version> 2 <step>")[0] == "<version>"
        assert PeftConfig.from_pretrained("tokens_model").trainable_token_indices == [49152, 49153, 49154]
    elif script == "columns_to_chat":
        assert printed.count("### Instruction:") == 3 and "Your input is" not in printed
    elif script == "sharegpt_chat":
        assert AutoModelForCausalLM.from_pretrained("model").dtype == torch.bfloat16
        assert "'role': 'user'" in printed and "<|im_start|>assistant\nMrs. Okonkwo runs it.<|im_end|>" in printed
    elif script == "curriculum":
        assert "a micro-batch of" in printed and "device" in printed
    elif script == "alpaca":
        assert "### Response:" in printed and "GB of memory reserved" in printed


@pytest.mark.slow
@pytest.mark.parametrize("script", CASES)
def test_scripts_run_on_the_real_model(script: str, demo_gguf: Path, script_data: Path, tmp_path: Path) -> None:
    name, (dataset, file), left = CASES[script]
    stand_ins = [f"--model={name}={demo_gguf}"] + ([f"--dataset={dataset}={script_data / file}"] if dataset else [])
    arguments = ["--output", "out"] if script == "plain_trl" else []
    done = subprocess.run([sys.executable, "-m", "gazelle", "run", str(SCRIPTS / f"{script}.py"), *stand_ins,
                           *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / path).stat().st_size > 0 for path in left)


def test_nothing_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "helper_of_it.py").write_text("from trl import SFTConfig\n")
    script.write_text(
        "import sys, torch, transformers, helper_of_it, gazelle\nfrom unsloth import *\nimport trl\n"
        "assert SFTTrainerAlias is trl.SFTTrainer\n".replace("SFTTrainerAlias", "UnslothTrainer")
        + "assert helper_of_it.SFTConfig is gazelle.SFTConfig\n"
        "assert transformers.TrainingArguments(evaluation_strategy='no', output_dir='x', fp16=True).fp16 is False\n"
        "assert torch.ones(2).to('cuda').device.type == 'cpu' and torch.ones(2).to(torch.float16).dtype.itemsize == 2\n"
        "assert torch.nn.Linear(2, 2).cuda().weight.device.type == 'cpu'\n"
        "assert torch.cuda.get_device_properties(0).total_memory > 0\nprint(sys.argv, __name__)\n")
    before, path, argv = dict(vars(torch.cuda)), list(sys.path), list(sys.argv)
    arguments, to, finders = transformers.TrainingArguments, torch.Tensor.to, list(sys.meta_path)
    assert main(["run", str(script), "--epochs", "3"]) == 0
    assert capsys.readouterr().out == f"[{str(script)!r}, '--epochs', '3'] __main__\n"
    assert "cuda" not in vars(torch.Tensor) and torch.Tensor.to is to and sys.meta_path == finders
    assert transformers.TrainingArguments is arguments and (sys.path, sys.argv) == (path, argv)
    assert {name for name in before if vars(torch.cuda)[name] is not before[name]} == set()
    assert not [name for name in sys.modules if name.partition(".")[0] in ("unsloth", "trl", "helper_of_it")]
    with pytest.raises(ModuleNotFoundError):
        __import__("unsloth")


@pytest.mark.parametrize(("code", "named", "instead"), [
    ("from trl import DPOTrainer", "DPOTrainer", "SFTTrainer on the answers that are preferred"),
    ("from trl import SFTTrainer, DataCollatorForCompletionOnlyLM", "DataCollatorForCompletionOnlyLM",
     "train_on_responses_only"),
    ("from unsloth import FastVisionModel", "FastVisionModel", "use FastLanguageModel, for models of text alone"),
    ("from unsloth import FastLanguageModle", "FastLanguageModle", "did you mean 'FastLanguageModel'?"),
    ("import trl.trainer.dpo_trainer", "dpo_trainer", "use one of"),
])
def test_what_is_not_there_is_said_at_import(
    code: str, named: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"{code}\nopen('left', 'w').write('never')\n")
    assert main(["run", str(script)]) == 2
    said = capsys.readouterr().err
    assert named in said and instead in said and "Traceback" not in said
    script.write_text(f"try:\n    {code}\nexcept ImportError:\n    print('without')\n")
    assert main(["run", str(script)]) == 0
    assert capsys.readouterr().out == "without\n"


def test_errors_and_exits_are_the_script_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(5)\n")
    assert main(["run", str(script)]) == 5
    script.write_text("def f():\n    raise RuntimeError('its own')\nf()\n")
    assert main(["run", str(script)]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: its own" in said and "line 2, in f" in said and "runpy" not in said
    script.write_text("import no_such_package\n")
    assert main(["run", str(script)]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "line", "found"), [
    (b"import sys\nsizes = (\n  1, 2\n", "line 2", "'(' was never closed: sizes = ("),
    (b"print('ran')\nfor x in y\n  pass\n", "line 2", "expected ':'"),
    (b"print('caf\xe9')\n", "line 1", "utf-8"),
])
def test_a_script_that_is_no_python(code: bytes, line: str, found: str, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_bytes(code)
    assert main(["run", str(script)]) == 2
    said = capsys.readouterr()
    assert f"{script}, {line}: the script is not valid Python" in said.err and found in said.err
    assert "Traceback" not in said.err and not said.out


def test_mistakes_in_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('ran')\n")
    assert main(["run", str(tmp_path / "other.py")]) == 2
    assert main(["run", str(script), "--model", f"a={tmp_path}/nothing"]) == 2
    assert main(["run", str(script), "--dataset", f"a={script}"]) == 2
    said = capsys.readouterr()
    assert "there is no model to stand in" in said.err and "ran" not in said.out
    with pytest.raises(OptionError, match="needs a name and a path"):
        parse_names(["a"], "--model")
    with pytest.raises(OptionError, match="given twice"):
        parse_names(["a=b", "a=c"], "--model")
    (tmp_path / "rows.txt").write_text("a\n")
    assert main(["run", str(script), "--dataset", f"org/name={tmp_path}/rows.txt"]) == 0
    assert "org/name was never asked for" in caplog.text


def test_stand_ins_follow_the_script_and_all_behind_is_its_own() -> None:
    given, rest = leading_stand_ins(["--model", "a=b", "--dataset=c=d", "--model", "own", "--dataset", "e=f"])
    assert given == {"--model": ["a=b"], "--dataset": ["c=d"]}
    assert rest == ["--model", "own", "--dataset", "e=f"]
    assert leading_stand_ins(["--", "--model", "a=b"])[1] == ["--model", "a=b"]


def test_splits_and_folders_stand_in(script_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from datasets import load_dataset\n"
        "assert len(load_dataset('org/rows', 'main', split='train_sft[:4]', revision='x')) == 4\n"
        "assert list(load_dataset('org/rows')) == ['train']\n"
        "assert len(load_dataset('org/rows', split='train+test')) == 2 * len(load_dataset('org/rows', split='train'))\n"
        "assert next(iter(load_dataset('org/rows', split='train', streaming=True)))['instruction']\n"
        "assert load_dataset('org/folder', split='test')[0]['text'] == 'b'\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text("text\na\n")
    (folder / "test.csv").write_text("text\nb\n")
    assert run_script(script, datasets={"org/rows": str(script_data / "rows.jsonl"), "org/folder": str(folder)}) == 0


def test_every_name_is_where_the_table_says() -> None:
    with standing_in():
        for module, names in MODULES.items():
            for name in names:
                assert getattr(__import__(module, fromlist=[name]), name) is not None
        trl = __import__("trl")
        for name in INSTEAD:
            with pytest.raises(NotThereError):
                getattr(trl, name)
        assert not hasattr(trl, "__file__") and not hasattr(trl, "anything_else")
