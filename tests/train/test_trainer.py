"""What a run leaves behind, what it accepts, and what it refuses."""

import copy
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tests.train.conftest import ROWS
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import DataError, OptionError, OutputError
from gazelle.data.encode import Encoded, Example
from gazelle.data.report import data_report
from gazelle.train.progress import Progress

QUIET: dict[str, Any] = {"max_steps": 2, "report": False, "disable_tqdm": True, "save_strategy": "no",
                         "logging_steps": 1, "max_length": 128, "per_device_train_batch_size": 2}
Make = Callable[..., Any]


def test_a_run_leaves_metrics_report_and_curve(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"report": True, "report_max_new_tokens": 4,
                                                          "disable_tqdm": False, "eval_strategy": "steps",
                                                          "eval_steps": 1, "report_samples": 2})
    rows = [*ROWS[:5], ROWS[5] | {"instruction": "<script>alert(1)</script>?"}]
    trainer = SFTTrainer(tiny(), args, rows, rows[4:], demo_tokenizer)
    trainer.train()

    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in training] == [1, 2]
    assert all(entry["tokens_per_second"] > 0 and entry["memory_gb"] > 0 for entry in training)
    assert sum("eval_loss" in entry for entry in entries) == 2

    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for outside in ("src=", "<link", "url(http", "@import"):
        assert outside not in page
    assert len(trainer.samples) == 2
    assert all(sample.prompt in page or "script" in sample.prompt for sample in trainer.samples)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().err
    assert "step 2/2 · loss" in printed and "tok/s" in printed and "left" in printed
    assert "evaluation loss" in printed
    assert f"{training[0]['loss']:.2f} → {training[1]['loss']:.2f}" in page

    short = SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path / "short"), **QUIET | {
        "report": True, "report_samples": 0, "logging_steps": 10}), rows, None, demo_tokenizer)
    mean = short.train().training_loss
    assert f"{mean:.2f} on average" in (tmp_path / "short" / "report.html").read_text()


def test_evaluation_weighs_every_token_once(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    losses = []
    for size in (1, 3, 8):
        args = SFTConfig(output_dir=str(tmp_path), **QUIET, per_device_eval_batch_size=size)
        losses.append(SFTTrainer(tiny(), args, ROWS, ROWS, demo_tokenizer).evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_resuming_gives_the_losses_of_an_unbroken_run(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def run(folder: Path, resume: bool = False, **options: Any) -> list[dict[str, Any]]:
        args = SFTConfig(output_dir=str(folder), **QUIET | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
                         | options)
        SFTTrainer(tiny(), args, ROWS, None, demo_tokenizer).train(resume_from_checkpoint=resume)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{"step": e["step"], "loss": e["loss"]} for e in map(json.loads, lines) if "loss" in e]

    whole = run(tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "checkpoint-3")
    broken = tmp_path / "broken"
    broken.mkdir()
    (tmp_path / "checkpoint-3").rename(broken / "checkpoint-3")
    (broken / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert run(broken, resume=True) == whole


def test_older_spellings_are_taken(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", per_device_train_batch_size=2,
                             save_strategy="no", disable_tqdm=True, use_cpu=True)
    trainer = SFTTrainer(
        model=tiny(), tokenizer=demo_tokenizer, train_dataset=Dataset.from_list([{"text": "a b c"}, {"text": "d e"}]),
        dataset_text_field="text", max_seq_length=64, dataset_num_proc=2, packing=False, args=args,
    )
    assert trainer.args.max_length == 64
    trainer.train()
    assert SFTConfig(evaluation_strategy="no", max_seq_length=7).max_length == 7


def test_formatting_func_and_peft_config(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        tiny(adapter=False), SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS, processing_class=demo_tokenizer,
        formatting_func=lambda row: f"{row['instruction']} {row['output']}", peft_config=LoraConfig(r=2, lora_alpha=4),
    )
    trainer.train()
    assert trainer.model.peft_config["default"].r == 2


def test_a_collator_of_ones_own(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"max_steps": 1, "per_device_train_batch_size": 8})
    own = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer,
                     data_collator=DataCollatorForSeq2Seq(demo_tokenizer))
    own.train()
    packed = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer)
    packed.train()
    assert own.state.log_history[0]["loss"] == pytest.approx(packed.state.log_history[0]["loss"], rel=1e-5)


def test_rows_that_are_encoded_already(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {"input_ids": [1, 8, 9], "labels": [-100, 8, 9]}]
    trainer = SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET | {"max_steps": 1}), rows,
                         processing_class=demo_tokenizer)
    trainer.train()
    model = tiny()
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="sum").item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / 4, rel=1e-5)
    with pytest.raises(DataError, match="differ in length"):
        SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET), [{"input_ids": [1, 2], "labels": [1]}],
                   processing_class=demo_tokenizer)


def test_the_model_is_as_before_when_training_ends(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny()
    before = (model.config._attn_implementation, model.config.use_cache)
    SFTTrainer(model, SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS, processing_class=demo_tokenizer).train()
    assert (model.config._attn_implementation, model.config.use_cache) == before


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_train(
    optim: str, tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"max_steps": 8, "optim": optim, "learning_rate": 1e-2,
                                                          "per_device_train_batch_size": 8})
    trainer = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lerning_rate": 1e-4}, "learning_rate"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"max_length": 0}, "at least 1"),
        ({"packing_strategy": "ffd"}, "bfd"),
        ({"train_on": "answers"}, "responses"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"max_length": 5, "max_seq_length": 6}, "one of them"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError) as caught:
        SFTConfig(**options)
    assert named in str(caught.value)
    assert caught.value.found and caught.value.fix


def test_refusals_come_before_anything_is_written(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = SFTConfig(output_dir=str(out), **QUIET)
    with pytest.raises(OptionError, match="tokenizer"):
        SFTTrainer(tiny(), args, ROWS)
    with pytest.raises(DataError):
        SFTTrainer(tiny(), args, [{"instruction": "x", "output": None}], processing_class=demo_tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path / "file"), **QUIET), ROWS, processing_class=demo_tokenizer)
    assert not out.exists()
    trainer = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer)
    with pytest.raises(OptionError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(OptionError, match="not a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_peft_config_is_taken_as_it_is(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Also where its values are PEFT's defaults, which are not ours."""
    trainer = SFTTrainer(tiny(adapter=False), SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS,
                         processing_class=demo_tokenizer, peft_config=LoraConfig(r=8, lora_alpha=8))
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (8, 8, {"q_proj", "v_proj"})
    with pytest.raises(OptionError, match="adapter configuration"):
        SFTTrainer(tiny(adapter=False), SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS,
                   processing_class=demo_tokenizer, peft_config={"r": 8})


def test_padding_in_tokenised_rows_is_not_learnt(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"input_ids": [1, 5, 6, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    trainer = SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET), rows, processing_class=demo_tokenizer)
    assert trainer.train_dataset[0]["input_ids"] == [1, 5, 6]
    assert trainer.train_dataset[0]["labels"] == [-100, 5, 6]
    for bad in ([{"input_ids": []}], Dataset.from_dict({"input_ids": []})):
        with pytest.raises(DataError, match=r"no tokens|no rows"):
            SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET), bad, processing_class=demo_tokenizer)


def test_without_a_pad_token_padded_rows_are_still_apart(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"per_device_train_batch_size": 8, "max_steps": 1})
    packed = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer).evaluate(ROWS)
    monkeypatch.setattr("gazelle.train.trainer.supports_packing", lambda model: "the test says so")
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.pad_token = None
    padded = SFTTrainer(tiny(), args, ROWS, processing_class=tokenizer).evaluate(ROWS)
    assert padded["eval_loss"] == pytest.approx(packed["eval_loss"], rel=1e-5)


def test_what_scripts_pass_along(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """compute_metrics, a language-modelling collator, warmup_ratio, new rows for evaluate."""
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"share": 0.5}

    args = SFTConfig(output_dir=str(tmp_path), **QUIET, warmup_ratio=0.1, warmup_steps=0, logging_dir="logs")
    assert args.warmup_steps == 0.1
    trainer = SFTTrainer(tiny(), args, ROWS, ROWS[:2], demo_tokenizer, compute_metrics=compute_metrics,
                         data_collator=DataCollatorForLanguageModeling(demo_tokenizer, mlm=False),
                         preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    trainer.train()
    assert trainer.evaluate()["eval_share"] == 0.5
    assert len(seen[0]) == 2
    plain = SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS, ROWS[:2], demo_tokenizer)
    assert plain.evaluate(ROWS[:2])["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    several = SFTTrainer(tiny(), SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS, {"a": ROWS[:2], "b": ROWS[2:]},
                         demo_tokenizer)
    assert {"eval_a_loss", "eval_b_loss"} <= several.evaluate().keys()


def test_options_given_directly_are_checked_and_stay_here(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), report=False)
    with pytest.raises(OptionError, match="learning_rate"):
        SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer, learning_rate=-3)
    trainer = SFTTrainer(tiny(), args, ROWS, processing_class=demo_tokenizer, packing=True)
    assert (trainer.args.packing, trainer.args.max_length) == (True, 512)
    assert (args.packing, args.max_length) == (False, None)


def test_an_error_in_training_leaves_the_model_usable(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("a user's own mistake")

    model = tiny()
    before = (model.config._attn_implementation, model.config.use_cache)
    trainer = SFTTrainer(model, SFTConfig(output_dir=str(tmp_path), **QUIET | {"disable_tqdm": False}), ROWS,
                         processing_class=demo_tokenizer, callbacks=[Fails()])
    assert model.config.use_cache == before[1]
    with pytest.raises(KeyError):
        trainer.train()
    assert (model.config._attn_implementation, model.config.use_cache) == before
    assert trainer._progress.bar is None


def test_a_line_cut_short_does_not_stop_a_resume(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"save_strategy": "steps", "save_steps": 1})
    SFTTrainer(tiny(), args, ROWS, None, demo_tokenizer).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    args.max_steps = 3
    SFTTrainer(tiny(), args, ROWS, None, demo_tokenizer).train(resume_from_checkpoint=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3
    other = get_peft_model(tiny(adapter=False), LoraConfig(r=3, target_modules="all-linear"))
    with pytest.raises(OptionError, match="another adapter"):
        SFTTrainer(other, args, ROWS, None, demo_tokenizer).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{")
    with pytest.raises(OptionError, match="not a checkpoint"):
        SFTTrainer(tiny(), args, ROWS, None, demo_tokenizer).train(str(tmp_path / "checkpoint-3"))


def test_generation_stops_where_the_template_ends_a_turn(
    tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    model = tiny()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    SFTTrainer(model, SFTConfig(output_dir=str(tmp_path), **QUIET), ROWS, processing_class=tokenizer)
    assert model.generation_config.eos_token_id == [0, 2]


def test_warnings_are_not_taken_for_markup(tmp_path: Path) -> None:
    screen = io.StringIO()
    report = data_report(Encoded([Example([1, 2], [-100, 2], "row 1")]))
    report = dataclasses.replace(report, warnings=["tokens ['[/INST]']"])
    progress = Progress(report, Console(file=screen, force_terminal=True, width=100))
    progress.on_train_begin(SFTConfig(), TrainerState(max_steps=1), TrainerControl())
    progress.stop()
    assert "[/INST]" in screen.getvalue()


def test_raw_text_needs_no_chat_template(tiny: Make, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Base models have none, and continued training on text is what they are for."""
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = None
    args = SFTConfig(output_dir=str(tmp_path), **QUIET | {"report": True})
    trainer = SFTTrainer(tiny(), args, [{"text": "a b c"}, {"text": "d e f"}], processing_class=tokenizer)
    trainer.train()
    assert tokenizer.chat_template is None
    assert (tmp_path / "report.html").exists()


def test_a_second_run_of_one_trainer_has_metrics_of_its_own(quick: Make, tmp_path: Path) -> None:
    """What was evaluated before the first run stays with it; numbers of NumPy that are none are null too."""
    class Odd(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logs["odd"] = np.float32("nan")

    trainer = quick()
    trainer.callback_handler.callbacks.insert(0, Odd())
    found = []
    trainer.evaluate()
    for _ in range(2):
        trainer.train()
        text = (tmp_path / "out" / "metrics.jsonl").read_text()
        assert "NaN" not in text
        found.append([json.loads(line)["step"] for line in text.splitlines()])
        trainer.evaluate()
    assert found == [[0, 1, 2, 3, 3], [1, 2, 3, 3]]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 5
