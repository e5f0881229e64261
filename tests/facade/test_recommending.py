"""`gazelle recommend`: what it proposes, why, that training takes it as it is, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle.__main__ import main
from gazelle.base.errors import DataError, OptionError, OutputError
from gazelle.cli.demo import PACKAGE
from gazelle.engine.keep import KEEP
from gazelle.facade import rules
from gazelle.facade.recommending import recommend, write_recipe
from gazelle.facade.run import check_recipe

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "recommend.json"
pytestmark = pytest.mark.usefixtures("one_thread")


def llama(**options: Any) -> LlamaConfig:
    """SmolLM2-135M's, with fewer layers."""
    return LlamaConfig(**{
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1024,
        "tie_word_embeddings": True} | options)


@pytest.fixture
def folder(demo_tokenizer: Any, tmp_path: Path) -> Path:
    """A model's config and tokenizer, without weights: they are not to be read."""
    place = tmp_path / "model"
    llama().save_pretrained(place)
    demo_tokenizer.save_pretrained(place)
    return place


def rows_file(folder: Path, count: int, words: int = 3) -> Path:
    path = folder / f"rows-{count}-{words}.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": "seven " * words + str(n)}) + "\n"
                            for n in range(count)))
    return path


def test_the_proposal_for_the_demo_scores_as_the_shipped_recipe() -> None:
    """As measured by benchmarks/recommend.py; what is proposed today is what was measured."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["right"] / result["questions"] >= result["right_shipped"] / result["questions"] - 0.03
    demo = json.loads((RESULT.parent / "demo.json").read_text(encoding="utf-8"))["by_category"]["after"]
    assert result["right_shipped"] == sum(right for right, _ in demo.values())
    assert result["questions"] == sum(asked for _, asked in demo.values()) == 80


def test_todays_proposal_is_what_was_measured(folder: Path) -> None:
    llama(num_hidden_layers=30, max_position_embeddings=2048).save_pretrained(folder)  # as the demo's model is
    found = recommend(str(PACKAGE / "demo/train.jsonl"), str(folder))
    measured = {item["option"]: item["value"] for item in json.loads(RESULT.read_text(encoding="utf-8"))["proposed"]}
    assert {f"{item.section}.{item.option}": item.value for item in found.choices
            if item.option not in ("name", "train")} == measured


def test_training_takes_it_as_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Written by the command, moved to another folder with its data, and trained for two steps."""
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    LlamaForCausalLM(llama(**small)).save_pretrained(folder)
    (tmp_path / "here").mkdir()
    text = "".join((PACKAGE / "demo/train.jsonl").read_text().splitlines(True)[:120])
    (tmp_path / "here" / "rows.jsonl").write_text(text)
    assert main(["recommend", "here/rows.jsonl", "--model", "model", "-o", "here/r.yaml", "--budget",
                 "3GB"]) == 0
    printed = capsys.readouterr().out
    for option in ("lora.r", "lora.lora_alpha", "train.learning_rate", "data.eval_split",
                   "gazelle train here/r.yaml"):
        assert option in printed
    written = (tmp_path / "here" / "r.yaml").read_text()
    content = yaml.safe_load(written)
    assert content["data"]["train"] == "rows.jsonl" and content["train"]["memory_budget"] == "3GB"
    assert written.count("# ") > 12
    assert content["model"]["name"] == str(folder)  # it is not below the recipe's folder
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert main(["train", "there/r.yaml", "train.max_steps=2", "train.eval_strategy=no", "train.save_strategy=no",
                 "data.eval_split=0", "train.load_best_model_at_end=false", "train.report=false"]) == 0
    assert (tmp_path / "out" / "rows" / "adapter_model.safetensors").exists()


def test_mistakes_are_named_before_anything_is_written(folder: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_file(tmp_path, 20)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken.yaml").write_text("mine\n")
    out = tmp_path / "new.yaml"
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "nowhere.jsonl"), "--model", str(folder)], "there is no such file"),
        ([str(tmp_path / "empty.jsonl"), "--model", str(folder)], "empty.jsonl"),
        ([str(rows), "--model", str(tmp_path / "no-model")], "no model at this path"),
        ([str(rows), "--model", str(folder), "--budget", "30MB"], "no plan fits into the memory budget"),
        ([str(rows), "--model", str(folder), "--budget", "lots"], "no size of memory"),
        ([str(rows), "--model", str(folder), "-o", str(tmp_path / "taken.yaml")], "a file of this name already"),
        ([str(rows)], "--model"),
    ]
    for arguments, said in cases:
        where = [] if "-o" in arguments else ["-o", str(out)]
        assert main(["recommend", *arguments, *where]) == 2
        printed = capsys.readouterr().err
        assert said in printed and "Traceback" not in printed, printed
    assert not out.exists() and (tmp_path / "taken.yaml").read_text() == "mine\n"
    with pytest.raises(DataError):
        recommend(str(tmp_path / "empty.jsonl"), str(folder))
    with pytest.raises(OptionError):
        recommend(str(rows), str(folder), budget="30MB")
    with pytest.raises(OutputError):
        write_recipe(recommend(str(rows), str(folder)), tmp_path / "taken.yaml")


def test_the_data_decides(folder: Path, tmp_path: Path) -> None:
    few, some, more = (recommend(str(rows_file(tmp_path, count)), str(folder)) for count in (40, 400, 1_200))
    assert [found.value("train", "num_train_epochs") for found in (few, some, more)] == [3, 3, 2]
    assert [found.value("data", "eval_split") for found in (few, some, more)] == [0.0, 0.1, 0.05]
    updates = [found.value("train", "per_device_train_batch_size") * found.value("train", "gradient_accumulation_steps")
               for found in (few, some, more)]
    assert updates == [2, 8, 16]
    assert few.recipe().sft_config().eval_strategy == "no"
    assert some.recipe().sft_config().eval_strategy == "epoch"
    assert few.value("train", "learning_rate") > more.value("train", "learning_rate")
    lines = {math.ceil(rows / batch) * epochs // found.value("train", "logging_steps") for rows, batch, epochs, found in
             ((360, 8, 3, some), (1140, 16, 2, more))}
    assert min(lines) >= 35


def test_long_rows_and_texts(folder: Path, tmp_path: Path) -> None:
    long = recommend(str(rows_file(tmp_path, 30, words=700)), str(folder))
    assert long.value("model", "max_seq_length") % 64 == 0
    assert long.report.train.truncated == 0 and 700 < long.value("model", "max_seq_length") <= 1024
    longer = recommend(str(rows_file(tmp_path, 30, words=1500)), str(folder))
    assert longer.value("model", "max_seq_length") == 1024 and longer.report.train.truncated == 30
    assert "is cut" in next(item.reason for item in longer.choices if item.option == "max_seq_length")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 2_000)
    text = recommend(str(tmp_path / "book.txt"), str(folder))
    assert text.value("train", "packing") is True and text.value("model", "max_seq_length") == 1024
    assert long.value("train", "packing") is False


def test_the_budget_decides(folder: Path, tmp_path: Path) -> None:
    rows = str(rows_file(tmp_path, 400, words=100))
    free = recommend(rows, str(folder))
    assert free.plan is not None and free.value("train", "per_device_train_batch_size") == 8
    tight = recommend(rows, str(folder), budget=int(free.plan.plan.peak * 0.7))
    assert tight.plan is not None and tight.plan.plan.peak <= 0.7 * free.plan.plan.peak
    micro, pieces = (tight.value("train", name) for name in ("per_device_train_batch_size",
                                                             "gradient_accumulation_steps"))
    assert micro < 8 and micro * pieces == 8
    assert all(keep == KEEP for keep in tight.plan.plan.keeps)


def test_bits_on_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 where every layer keeps everything, else 4, else 4 with layers made again. Plans are numbers: none is used."""
    monkeypatch.setattr("gazelle.facade.recommending.default_device", lambda: "cuda")
    rows = str(rows_file(tmp_path, 100, words=300))
    wide, narrow, least = (recommend(rows, str(folder), budget=budget) for budget in ("3GB", "0.6GB", "0.45GB"))
    for found, four, kept in ((wide, False, True), (narrow, True, True), (least, True, False)):
        assert found.plan is not None and found.value("model", "load_in_4bit") is four
        assert all(keep == KEEP for keep in found.plan.plan.keeps) is kept
        assert [item.value for item in found.choices if item.option == "optim"] == ["adamw_8bit"] * four
    assert "are faster" in wide.as_yaml() and "no room for 16 bits" in narrow.as_yaml()
    assert "layers are made again" in least.as_yaml()


def test_a_model_without_a_plan(demo_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import OlmoConfig

    OlmoConfig(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
               ).save_pretrained(tmp_path / "olmo")
    demo_tokenizer.save_pretrained(tmp_path / "olmo")
    found = recommend(str(rows_file(tmp_path, 400)), str(tmp_path / "olmo"))
    assert found.plan is None and found.value("train", "per_device_train_batch_size") == 2
    assert found.value("train", "gradient_accumulation_steps") == 4
    assert "does not know olmo" in next(item.reason for item in found.choices
                                        if item.option == "per_device_train_batch_size")


def test_rates_are_those_of_the_sources() -> None:
    """Llama 3.1 8B and Qwen3 8B, as Tinker's cookbook works them out, and the edges of the rule."""
    assert rules.learning_rate(4096, "llama", 5_000)[0] == pytest.approx(2.9e-4)
    assert rules.learning_rate(4096, "qwen3", 5_000)[0] == pytest.approx(4.7e-4)
    assert rules.learning_rate(4096, "mistral", 5_000)[0] == pytest.approx(2.9e-4)  # the lower of the two
    assert rules.learning_rate(1024, "mistral", 5_000)[0] == pytest.approx(5.3e-4)
    assert rules.learning_rate(4096, "llama", 100)[0] == pytest.approx(4.3e-4)  # 15 for 10
    assert rules.learning_rate(64, "llama", 10)[0] == rules.HIGHEST_RATE


def test_a_rank_holds_what_is_to_be_learnt() -> None:
    assert [rules.rank(tokens, 100_000)[0] for tokens in (10, 1_600_000, 1_600_001, 12_800_000, 10**9)] \
        == [16, 16, 32, 128, 128]
    assert "full fine-tuning" in rules.rank(10**9, 100_000)[1]


def test_every_rule_has_its_bounds() -> None:
    assert [rules.rows_an_update(rows)[0] for rows in (1, 100, 367, 800, 10**6)] == [2, 2, 8, 16, 16]
    assert [rules.epochs(rows)[0] for rows in (999, 1_000, 9_999, 10_000)] == [3, 2, 2, 1]
    assert [rules.held_out(rows)[0] for rows in (99, 100, 999, 1_000, 10_000, 10**6)] \
        == [0.0, 0.1, 0.1, 0.05, 0.05, 0.0005]
    assert rules.length(92, 2048, text=False)[0] == 512
    assert rules.length(700, None, text=False)[0] == 704
    assert rules.length(5_000, 2048, text=False)[0] == 2048
    assert rules.length(0, None, text=True)[0] == 2048


def test_rows_of_one_prompt_are_not_parted(folder: Path, tmp_path: Path) -> None:
    """What is proposed has to train: a share that `hold_out` refuses is none."""
    path = tmp_path / "poems.jsonl"
    rows = [{"question": "Write a poem.", "answer": f"Poem {n}."} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = recommend(str(path), str(folder))
    assert found.value("data", "eval_split") == 0
    assert next(item.reason for item in found.choices if item.option == "eval_split").startswith("rows hang together")
    assert all(item.option != "eval_strategy" for item in found.choices)
    check_recipe(found.recipe())
