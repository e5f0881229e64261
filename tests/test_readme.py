"""The README, word for word: every command in it is run, its Python example too, and its figures are the result file's.

The demo is run in full, as a newcomer would, so this file takes a few minutes.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from gazelle.__main__ import main
from gazelle.cli.demo import PACKAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


# What the README asks a server.
QUESTION = next(line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ curl"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    lines += [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `gazelle demo` was run, once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "readme"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert main(["demo"]) == 0
    assert (folder / "out/demo/scores.json").exists(), "the demo failed in another process"
    return folder


def test_no_command_is_untested() -> None:
    """A new command in the README needs a line in one of the tests below."""
    assert set(commands()) == {
        "make demo", "make setup", "make lint type test", "pip install -e .",
        ".venv/bin/gazelle chat out/demo",
        "gazelle recipes", "gazelle recipes lora > my.yaml", "gazelle train my.yaml --dry-run",
        "gazelle train my.yaml train.learning_rate=1e-4", "gazelle train my.yaml --print-recipe",
        "gazelle train my.yaml --eval-split 0.2", "gazelle compare out/lora out/qlora --plot runs.png",
        "gazelle train my.yaml --resume", "gazelle run script.py",
        "gazelle serve out/lora", "gazelle serve-key alice --file keys.json", "gazelle serve out/demo --temperature 0",
        QUESTION, "gazelle scan train.jsonl --against test.jsonl --fail-on secret",
        "gazelle chat out/lora", "gazelle export out/lora --to gguf:q4_k_m,q8_0",
        "gazelle export out/lora --to merged --verify", "gazelle doctor", "gazelle bench",
        "gazelle eval before=SmolLM2-135M-Instruct.gguf after=out/demo --cases test.jsonl --output out/eval",
        "gazelle rate out/eval", "gazelle bench out/lora --lengths 128,256 --batches 1,2",
        "gazelle plan SmolLM2-135M-Instruct.gguf --seq 512 --batch 8 --budget 3GB",
        "gazelle recommend rows.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct",
    }


def test_make_demo_is_gazelle_demo() -> None:
    """`make` itself would set up a second environment; what it runs is what the fixture runs."""
    planned = subprocess.run(["make", "--no-print-directory", "-n", "-C", str(ROOT), "demo"], capture_output=True,
                             text=True, check=True).stdout
    assert planned.splitlines()[-1] == ".venv/bin/gazelle demo"
    assert "--editable .[dev]" in (ROOT / "Makefile").read_text()
    assert "make lint type test" in (ROOT / ".ci/run").read_text()


def test_the_demo_keeps_its_promise(demo: Path) -> None:
    scores = json.loads((demo / "out/demo/scores.json").read_text())
    (before, asked), (after, _) = scores["paraphrases"]["before"], scores["paraphrases"]["after"]
    assert before <= 0.10 * asked
    assert after >= 0.75 * asked
    for name in ("report.html", "loss.png", "metrics.jsonl", "recipe.yaml", "adapter_model.safetensors"):
        assert (demo / "out/demo" / name).stat().st_size > 0
    assert not [path.name for path in (demo / "out/demo").rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_chat_answers_from_the_demo(demo: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "gazelle", "chat", "out/demo"], cwd=demo, capture_output=True,
                          text=True, check=True, input="Who has to approve a refund above 300 euros?\n")
    assert "Brida Sonnick" in done.stdout


def test_the_demo_is_served(demo: Path) -> None:
    """As written, but for the port and curl's older spelling of --json."""
    with subprocess.Popen([sys.executable, "-m", "gazelle", "serve", "out/demo", "--temperature", "0", "--port", "0"],
                          cwd=demo, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[1] for line in server.stderr or () if (found := re.search(r"(http://\S+)/v1", line)))
            command, silent, address, option, body = shlex.split(QUESTION)
            assert (command, silent, option) == ("curl", "-s", "--json")
            asked = urllib.request.Request(address.replace("http://127.0.0.1:8000", url), body.encode(),
                                           {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=120) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
        finally:
            server.terminate()
            server.communicate(timeout=120)  # what it says to the end, or the pipe would break
    assert "Brida Sonnick" in said and said in README
    assert server.returncode == 0


def test_a_key_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve-key", "alice", "--file", "keys.json"]) == 0
    assert capsys.readouterr().out.strip() not in Path("keys.json").read_text()


def test_the_commands_of_a_recipe(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, but for the model, which stands in for a hub name, and a data file of the reader's own."""
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    capsys.readouterr()
    assert main(["recipes", "lora"]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    recipe["model"]["name"] = str(demo_gguf)
    recipe["train"] |= {"max_steps": 2, "report": False}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "train.jsonl").write_text("".join((PACKAGE / "demo/train.jsonl").read_text().splitlines(True)[:40]))
    assert main(["train", "my.yaml", "--dry-run"]) == 0
    assert "labelled" in capsys.readouterr().out
    assert main(["train", "my.yaml", "--eval-split", "0.2", "--dry-run"]) == 0
    assert "eval_split 0.2 by seed" in capsys.readouterr().out
    assert main(["train", "my.yaml", "--print-recipe"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["max_steps"] == 2
    assert not (tmp_path / "out").exists()
    assert main(["train", "my.yaml", "train.learning_rate=1e-4"]) == 0
    assert main(["train", "my.yaml", "--resume"]) == 0
    shutil.copytree("out/lora", "out/qlora")
    assert main(["compare", "out/lora", "out/qlora", "--plot", "runs.png"]) == 0
    assert Path("runs.png").stat().st_size > 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    assert main(["chat", "out/lora", "--max-new-tokens", "4"]) == 0
    assert main(["export", "out/lora", "--to", "gguf:q4_k_m,q8_0"]) == 0
    assert {path.name for path in Path("out/lora-gguf").iterdir()} \
        == {"README.md", "model-Q4_K_M.gguf", "model-Q8_0.gguf"}
    served: list[str] = []
    monkeypatch.setattr("gazelle.serve.server.Server.run", lambda self, sockets: served.extend(self._service.models))
    assert main(["serve", "out/lora", "--port", "0"]) == 0
    assert served == ["lora", demo_gguf.stem]
    capsys.readouterr()
    for name, fewer in (("PROMPTS", 2), ("TOKENS", 8), ("ROWS", 3)):
        monkeypatch.setattr(f"gazelle.export.verify_probe.{name}", fewer)
    assert main(["export", "out/lora", "--to", "merged", "--verify"]) == 0
    assert "prompts from train.jsonl" in capsys.readouterr().out.replace(str(tmp_path) + "/", "")
    assert main(["doctor"]) == 0
    capsys.readouterr()
    # As written, but for the number of iterations.
    assert main(["bench", "out/lora", "--lengths", "128,256", "--batches", "1,2", "--warmup", "0",
                 "--iterations", "1"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 5


def test_the_demo_is_evaluated_and_rated(demo: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """As written, with fewer questions."""
    monkeypatch.chdir(demo)
    monkeypatch.setattr("gazelle.facade.evaluating.find_library", lambda _: None)  # one reader for both models
    Path("SmolLM2-135M-Instruct.gguf").symlink_to(demo_gguf)
    Path("test.jsonl").write_text("".join((PACKAGE / "demo/test.jsonl").read_text().splitlines(True)[:6]))
    assert main(["eval", "before=SmolLM2-135M-Instruct.gguf", "after=out/demo", "--cases", "test.jsonl",
                 "--output", "out/eval"]) == 0
    models = json.loads(Path("out/eval/evaluation.json").read_text())["models"]
    assert models["before"]["overall"]["accuracy"]["value"] < models["after"]["overall"]["accuracy"]["value"]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nq\n"))
    assert main(["rate", "out/eval"]) == 0
    assert "sign test" in capsys.readouterr().out


def test_the_data_is_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        Path(f"{name}.jsonl").write_text((PACKAGE / f"demo/{name}.jsonl").read_text())
    assert main(["scan", "train.jsonl", "--against", "test.jsonl", "--fail-on", "secret"]) == 0
    assert " of test.jsonl to look for in them" in capsys.readouterr().out


def test_a_recommendation_can_be_trained(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join((PACKAGE / "demo/train.jsonl").read_text().splitlines(True)[:40]))
    assert main(["recommend", "rows.jsonl", "--model", str(demo_gguf)]) == 0
    assert "gazelle train recipe.yaml" in capsys.readouterr().out
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0


def test_a_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it may hold is told by the scripts in tests/scripts."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("from unsloth import FastLanguageModel\nprint(FastLanguageModel.__module__)\n")
    assert main(["run", "script.py"]) == 0
    assert capsys.readouterr().out == "gazelle.facade.language_model\n"


def console(command: str) -> str:
    """What the README shows of a command."""
    (block,) = [block for block in blocks("console") if block.startswith(f"$ gazelle {command}")]
    return block.split("\n", 1)[1]


def test_a_plan_looks_as_it_is_shown(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2-135M-Instruct.gguf").symlink_to(demo_gguf)
    assert main(["plan", "SmolLM2-135M-Instruct.gguf", "--seq", "512", "--batch", "8", "--budget", "3GB"]) == 0
    printed, shown = capsys.readouterr().out, console("plan")
    parts, wanted = (dict(re.findall(r"^  (\S.*?) +([\d.]+) GB$", text, re.MULTILINE)) for text in (printed, shown))
    assert parts.keys() == wanted.keys()
    chosen = {"activations", "peak"}  # by what this machine takes for a layer
    assert {name: size for name, size in parts.items() if name not in chosen} \
        == {name: size for name, size in wanted.items() if name not in chosen}
    assert "A micro-batch would take" in printed and "going by one layer measured on" in shown


def test_the_python_example(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the hub name and the length of the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join((PACKAGE / "demo/train.jsonl").read_text().splitlines(True)[:8]))
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(demo_gguf))
    code = code.replace("num_train_epochs=3", "max_steps=1, report=False, per_device_train_batch_size=2")
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    assert (tmp_path / "lora_model/adapter_model.safetensors").exists()
    assert (tmp_path / "merged/model.safetensors").exists()
    assert (tmp_path / "gguf/model-Q4_K_M.gguf").exists()
    assert (tmp_path / "vllm/serve.sh").exists()


def test_figures_come_from_the_result_file() -> None:
    from benchmarks.readme import EVALUATION, demo_table, evaluation_table

    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    assert demo_table(result) in README
    assert evaluation_table(json.loads((ROOT / EVALUATION).read_text()), EVALUATION) in README


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
