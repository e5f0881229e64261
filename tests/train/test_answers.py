"""Answers graded at each evaluation: which rows, what figures, where they are shown, and that training is none the
wiser."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.conftest import ROWS, small_llama
from tests.train.test_resume import dropped, weights_hash
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import OptionError
from gazelle.data.text_metrics import METRICS
from gazelle.train.config import with_options
from gazelle.train.metrics import eval_figures, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
EVAL = {"eval_strategy": "steps", "eval_steps": 1, "eval_generate": ["exact_match", "ROUGE-L", "chrF"],
        "eval_samples": 3, "eval_max_new_tokens": 6}


def length_kept(answer: str, expected: str) -> float:
    return random.random() * 0 + np.random.rand() * 0 + torch.rand(()).item() * 0 + float(len(answer) == len(expected))


def first_letters(answer: str, expected: str) -> float:
    return float(answer[:1] == expected[:1])


def test_figures_are_those_of_greedy_answers(quick: Callable[..., SFTTrainer]) -> None:
    """Against transformers' own greedy decoding of the prompts as the chat template renders them."""
    trainer = quick(eval_generate=["exact_match", "chrf", first_letters], eval_samples=2, eval_max_new_tokens=7)
    found = trainer.evaluate()
    tokenizer, model = trainer.processing_class, trainer.model
    said = []
    for row in ROWS[:2]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": row["instruction"]}], return_tensors="pt",
                                            add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            out = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7,
                                        do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
        said.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
    from sacrebleu.metrics import CHRF

    expected = [row["output"] for row in ROWS[:2]]
    asked = trainer._answers.drawn(trainer.prepared)[""]
    assert sorted(one.expected for one in asked) == sorted(expected)
    assert found["eval_chrf"] == pytest.approx(CHRF().corpus_score(said, [expected]).score)
    assert found["eval_exact_match"] == np.mean([a == b for a, b in zip(said, expected, strict=True)])
    assert found["eval_first_letters"] == np.mean([a[:1] == b[:1] for a, b in zip(said, expected, strict=True)])
    assert found["eval_perplexity"] == pytest.approx(np.exp(found["eval_loss"]))


@pytest.mark.parametrize("options", [{"engine": True}, {"engine": False}, {"packing": True, "train_on": "all"}],
                         ids=lambda options: ",".join(options))
def test_training_is_the_same_with_and_without(quick: Callable[..., SFTTrainer], options: dict[str, Any],
                                               bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    hashes, states = [], []
    for extra in ({}, EVAL | {"eval_generate": ["rougeL", length_kept]}):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        trainer = quick(dropped(small_llama(bytes_tokenizer, adapter=False)), **options, **extra)
        torch.manual_seed(3)
        trainer.train()
        hashes.append(weights_hash(trainer.model))
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
        assert trainer.model.training
    assert hashes[0] == hashes[1]
    assert states[0] == states[1]


def test_a_resumed_run_grades_the_same_answers(quick: Callable[..., SFTTrainer], tmp_path: Path,
                                               bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    def run(name: str, resume: Any = None) -> tuple[str, list[dict[str, Any]]]:
        trainer = quick(dropped(small_llama(bytes_tokenizer, adapter=False)), **EVAL, save_strategy="steps",
                        save_steps=1, output_dir=str(tmp_path / name))
        trainer.train(resume_from_checkpoint=resume)
        entries = [eval_figures(entry) for entry in read_metrics(tmp_path / name / "metrics.jsonl")]
        return weights_hash(trainer.model), [entry for entry in entries if entry]

    whole = run("whole")
    assert len(whole[1]) == 3
    cut = run("cut", str(tmp_path / "whole" / "checkpoint-1"))
    assert cut[0] == whole[0] and cut[1] == whole[1][1:]


def test_shown_in_line_file_and_report(quick: Callable[..., SFTTrainer], tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    quick(**EVAL, disable_tqdm=False, report=True, report_samples=0).train()
    entries = [entry for entry in read_metrics(tmp_path / "out" / "metrics.jsonl") if "eval_loss" in entry]
    assert len(entries) == 3 and all(entry.keys() >= {"eval_perplexity", "eval_rougeL", "eval_chrf"}
                                     for entry in entries)
    last = entries[-1]
    assert (f"evaluation loss {last['eval_loss']:.4f} · perplexity {last['eval_perplexity']:.4g} · exact_match "
            f"{last['eval_exact_match']:.4g} · rougeL {last['eval_rougeL']:.4g} · chrf") in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<b>{last['eval_perplexity']:.3g}</b><span>evaluation perplexity" in page
    assert "<span>evaluation rougeL" in page and "chrf / 100" in page


def test_several_sets_and_the_best_model(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The best step is that of the highest figure; early stopping stops where it stays the same."""
    figures = iter([0.25, 0.5, 0.5, 0.5, 0.5, 0.5])

    def staged(answer: str, expected: str) -> float:
        return staged.now  # type: ignore[attr-defined]

    class Stage(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            staged.now = next(figures)  # type: ignore[attr-defined]

    args = SFTConfig(output_dir=str(tmp_path), max_steps=6, report=False, disable_tqdm=True, max_length=128,
                     eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, eval_samples=2,
                     eval_max_new_tokens=2, load_best_model_at_end=True, metric_for_best_model="eval_b_staged",
                     eval_generate=[staged])
    trainer = SFTTrainer(small_llama(bytes_tokenizer), args, ROWS, {"a": ROWS[:2], "b": ROWS[2:5]}, bytes_tokenizer,
                         callbacks=[Stage(), EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 4
    sets = [found for entry in read_metrics(tmp_path / "metrics.jsonl") if (found := eval_figures(entry))]
    assert [name for found in sets[:2] for name in found] == ["a", "b"]
    assert sets[0]["a"].keys() == {"loss", "perplexity", "staged"}


def test_the_sample_follows_from_the_seed(quick: Callable[..., SFTTrainer]) -> None:
    def drawn(rows: str = "train", **options: Any) -> list[Any]:
        trainer = quick(eval_generate=["contains"], **options)
        trainer.prepared.eval = getattr(trainer.prepared, rows)
        return trainer._answers.drawn(trainer.prepared)[""]

    assert drawn(eval_samples=3) == drawn(eval_samples=3) != drawn(eval_samples=3, seed=8)
    assert len(drawn(eval_samples=3)) == 3 and len(drawn(eval_samples=99)) == len(ROWS)
    assert len(drawn("eval")) == 2 and sorted(drawn("eval", train_on="all")) == sorted(drawn("eval"))


def test_refusals(quick: Callable[..., SFTTrainer], bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'chrf'"):
        SFTConfig(eval_generate=["chfr"])
    with pytest.raises(OptionError, match="name of its own"):
        SFTConfig(eval_generate=[lambda answer, expected: 1.0])
    with pytest.raises(OptionError, match="exclude each other"):
        SFTTrainer(small_llama(bytes_tokenizer), SFTConfig(output_dir=str(tmp_path), eval_generate=["chrf"]), ROWS,
                   ROWS, bytes_tokenizer, compute_metrics=lambda _: {})
    with pytest.raises(OptionError, match=r"eval_loss, eval_perplexity, eval_chrf"):
        quick(eval_generate=["chrf"], metric_for_best_model="rougeL")
    best = SFTConfig(output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="epoch",
                     save_strategy="epoch")
    with pytest.raises(OptionError, match="write eval_a_loss"):  # of several sets none is called eval_loss
        SFTTrainer(small_llama(bytes_tokenizer), best, ROWS, {"a": ROWS[:2], "b": ROWS[2:]}, bytes_tokenizer)
    with pytest.raises(OptionError, match="no evaluation set"):
        SFTTrainer(small_llama(bytes_tokenizer), SFTConfig(output_dir=str(tmp_path)), ROWS, {}, bytes_tokenizer)
    texts = SFTTrainer(small_llama(bytes_tokenizer), SFTConfig(output_dir=str(tmp_path), eval_generate=["chrf"]),
                       [{"text": "a text"}], [{"text": "another text"}], bytes_tokenizer)
    with pytest.raises(OptionError, match="no evaluation row can be answered"):
        texts.train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_options() -> None:
    config = SFTConfig(per_device_train_batch_size=3, eval_generate=["chrf", first_letters],
                       metric_for_best_model="perplexity")
    assert config.per_device_eval_batch_size == 3 and config.greater_is_better is False
    assert json.loads(config.to_json_string())["eval_generate"] == ["chrf", "first_letters"]
    assert SFTConfig(per_device_eval_batch_size=5).per_device_eval_batch_size == 5
    assert with_options(TrainingArguments(per_device_train_batch_size=2)).per_device_eval_batch_size == 2
    assert set(METRICS) >= {"exact_match", "rougeL", "bleu", "chrf"}


def test_rows_are_held_out_alike_at_each_start(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def make(**options: Any) -> SFTTrainer:
        args = SFTConfig(output_dir=str(tmp_path), eval_split=0.25, max_steps=2, disable_tqdm=True, max_length=128,
                         save_strategy="steps", save_steps=1, report_samples=0, **options)
        return SFTTrainer(small_llama(bytes_tokenizer), args, [*ROWS, ROWS[0]], None, bytes_tokenizer)

    first = make()
    assert first.args.eval_strategy == "epoch"
    first.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for one, other in ((first.prepared.train, again.prepared.train), (first.prepared.eval, again.prepared.eval)):
        assert one.examples == other.examples
    assert first.prepared.report is not None and first.prepared.report.overlap_prompts == 0
    page = (tmp_path / "report.html").read_text()
    assert "rows held together: the same text 2, the same prompt 2" in page and "7 rows left" in page
    with pytest.raises(OptionError, match="evaluation rows already"):
        SFTTrainer(small_llama(bytes_tokenizer), SFTConfig(output_dir=str(tmp_path), eval_split=0.1), ROWS, ROWS,
                   bytes_tokenizer)


def test_answers_end_where_positions_do(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """GPT-2 has a table of positions, and no answer may run beyond it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
                                       eos_token_id=bytes_tokenizer.eos_token_id))
    rows = [{"instruction": "x7q9" * 11, "output": "b"}]
    trainer = SFTTrainer(model, SFTConfig(output_dir=str(tmp_path), eval_generate=["exact_match"], disable_tqdm=True,
                                          max_length=64), ROWS, rows, bytes_tokenizer)
    assert 45 < len(trainer._answers.drawn(trainer.prepared)[""][0].prompt) < 64
    assert trainer.evaluate()["eval_exact_match"] in (0, 1)
