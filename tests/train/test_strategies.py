"""Each strategy is measured at what it is for."""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.conftest import ROWS, small_llama, with_adapter
from transformers import EarlyStoppingCallback, TrainerCallback

from gazelle import (
    CurriculumTrainer,
    DistillationTrainer,
    DynamicSequenceLengthTrainer,
    SFTConfig,
    SFTTrainer,
    profile_io,
    save_teacher_logits,
    train_on_responses_only,
)
from gazelle.base.errors import ModelError, OptionError
from gazelle.data.encode import Example
from gazelle.engine.keep import ALL, KEEP
from gazelle.facade.language_model import bind
from gazelle.models.precision import MixedPrecisionConfig, set_mixed_precision
from gazelle.train.strategies.batching import token_batches
from gazelle.train.strategies.distillation import distillation_loss, kept_distillation_loss
from gazelle.train.strategies.incremental import Replay
from gazelle.train.strategies.order import bucketed_order, curriculum_order
from gazelle.train.strategies.teacher_logits import TopLogits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(bytes_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Trainers on tokenised rows."""

    def trainer(rows: Any, kind: Any = SFTTrainer, model: Any = None, evaluation: Any = None,
                extra: dict[str, Any] | None = None, **options: Any) -> Any:
        settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report": False, "disable_tqdm": True,
                    "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "max_length": 128,
                    "output_dir": str(tmp_path / "out"), "lr_scheduler_type": "constant"} | options
        if kind is DynamicSequenceLengthTrainer:
            del settings["max_length"]
        models = {"student_model": model} if kind is DistillationTrainer else \
            {"model": small_llama(bytes_tokenizer) if model is None else model}
        return kind(**models, args=SFTConfig(**settings), train_dataset=rows, eval_dataset=evaluation,
                    processing_class=bytes_tokenizer, **(extra or {}))

    return trainer


def lengths_of(*sizes: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [5 + at % 200 for at in range(size)]} for size in sizes]


class Batches(TrainerCallback):
    """The lengths of the rows of every micro-batch, in the order they were trained on."""

    def __init__(self, trainer: Any) -> None:
        self.seen: list[list[int]] = []
        collate = trainer.data_collator

        def noting(entries: list[dict[str, Any]]) -> dict[str, Any]:
            self.seen.append([len(row.input_ids) for entry in entries for row in entry["rows"]])
            return collate(entries)

        trainer.data_collator = noting


def test_a_curriculum_begins_with_short_rows_and_loses_none(make: Any) -> None:
    rows = lengths_of(*(4 + (37 * n) % 96 for n in range(96)))
    trainer = make(rows, CurriculumTrainer, num_train_epochs=2, max_steps=-1,
                   extra={"start_length": 16, "end_length": 100, "steps": 20})
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.seen) == 48
    for step, batch in enumerate(batches.seen[:16]):
        assert max(batch) <= 16 + 84 * step / 20 + 8  # the next easiest come early where too few are left
    means = [sum(map(sum, batches.seen[at : at + 6])) / 24 for at in range(0, 24, 6)]
    assert means == sorted(means)
    for epoch in (batches.seen[:24], batches.seen[24:]):
        assert sorted(itertools.chain(*epoch)) == sorted(len(row["input_ids"]) for row in rows)
    assert max(batches.seen[24]) > 60  # 24 steps have passed: the second epoch is in any order
    again = trainer.curriculum.order(0)
    assert again == trainer.curriculum.order(0) != trainer.curriculum.order(1)


def test_difficulty_by_loss_and_by_a_function(make: Any) -> None:
    rows = lengths_of(*range(8, 24))
    by = make(rows, CurriculumTrainer, extra={"difficulty_metric": lambda row: -len(row["input_ids"]),
                                              "start_length": 1, "end_length": 4, "steps": 1000})
    first = [len(rows[index]["input_ids"]) for index in by.curriculum.order(0)[:4]]
    assert sorted(first) == [20, 21, 22, 23]
    trainer = make(rows, CurriculumTrainer, extra={"difficulty_metric": "loss", "start_length": 1, "end_length": 4})
    losses = trainer.curriculum.measured()
    for number in (0, 9):
        ids = torch.tensor([rows[number]["input_ids"]])
        want = trainer.model(input_ids=ids, labels=ids).loss.item()
        assert losses[number] == pytest.approx(want, rel=1e-5)
    easiest = sorted(range(16), key=lambda index: losses[index])[:5]
    trainer.train()
    assert set(trainer.curriculum.order(0)[:4]) <= set(easiest)
    assert trainer.curriculum.measured() is losses  # as they were before the first step
    for wrong in ({"difficulty_metric": "size"}, {"start_length": 9, "end_length": 8}, {"steps": 0}):
        with pytest.raises(OptionError):
            make(rows, CurriculumTrainer, extra=wrong)


def test_a_curriculum_goes_on_where_it_was(make: Any, tmp_path: Path) -> None:
    rows = lengths_of(*(4 + (37 * n) % 96 for n in range(64)))
    options: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "extra": {
        "difficulty_metric": "loss", "start_length": 1, "end_length": 3, "steps": 12}}
    whole = make(rows, CurriculumTrainer, **options)
    seen = Batches(whole)
    whole.train()
    broken = make(rows, CurriculumTrainer, **options)
    rest = Batches(broken)
    broken.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert rest.seen[-7:] == seen.seen[-7:]


def test_rows_of_like_length_go_together(make: Any) -> None:
    sizes = [5 + (53 * n) % 90 for n in range(128)]
    trainer = make(lengths_of(*sizes), DynamicSequenceLengthTrainer, num_train_epochs=1, max_steps=-1,
                   extra={"max_sequence_length": 128, "min_sequence_length": 16, "length_step": 8})
    batches = Batches(trainer)
    trainer.train()
    wide = [batch for batch in batches.seen if max(batch) - min(batch) >= 8 and max(batch) > 16]
    assert len(wide) <= 11 // 2 + 4  # what is left over of eleven buckets
    assert sorted(itertools.chain(*batches.seen)) == sorted(sizes)
    random = Batches(other := make(lengths_of(*sizes), num_train_epochs=1, max_steps=-1))
    other.train()

    def padding(seen: list[list[int]]) -> float:
        return 1 - sum(map(sum, seen)) / sum(max(batch) * len(batch) for batch in seen)

    assert padding(batches.seen) < 0.15 < 0.3 < padding(random.seen)
    assert batches.seen != sorted(batches.seen)
    cut = make(lengths_of(300), DynamicSequenceLengthTrainer, extra={"max_sequence_length": 64,
                                                                     "min_sequence_length": 16})
    assert len(cut.train_dataset[0]["input_ids"]) == 64


def test_orders_keep_every_row() -> None:
    for seed in range(20):
        sizes = torch.randint(1, 60, (seed * 3 + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert sorted(bucketed_order(sizes, 4, 10, 7, seed)) == list(range(len(sizes)))
        ranks = sorted(range(len(sizes)), key=lambda index: sizes[index])
        assert sorted(curriculum_order(ranks, lambda step: 3 * step, 4, 0, seed)) == list(range(len(sizes)))
        for padded in (True, False):
            batches = token_batches(sizes, 80, 5, padded=padded, seed=seed)
            assert sorted(itertools.chain(*batches)) == list(range(len(sizes)))
            for batch in batches:
                rows = [sizes[index] for index in batch]
                assert len(rows) <= 5 and (len(rows) == 1 or (max(rows) * len(rows) if padded else sum(rows)) <= 80)


def test_dynamic_batches_hold_a_like_number_of_tokens(make: Any) -> None:
    sizes = [6] * 60 + [12] * 30 + [96] * 6
    fixed = make(lengths_of(*sizes), num_train_epochs=1, max_steps=-1, per_device_train_batch_size=2)
    before = Batches(fixed)
    fixed.train()
    dynamic = make(lengths_of(*sizes), num_train_epochs=1, max_steps=-1, per_device_train_batch_size=2)
    dynamic.enable_dynamic_batching(max_batch_size=16, timeout=0.1)
    after = Batches(dynamic)
    dynamic.train()
    assert dynamic.state.global_step < fixed.state.global_step / 2
    assert sorted(itertools.chain(*after.seen)) == sorted(sizes)
    assert max(sum(batch) for batch in after.seen) <= 2 * 96
    assert max(map(len, after.seen)) <= 16
    assert sum(sizes) / len(after.seen) > 2 * sum(sizes) / len(before.seen)  # tokens a step
    with pytest.raises(OptionError, match="max_batch_size"):
        dynamic.enable_dynamic_batching(0)
    with pytest.raises(OptionError, match="another way already"):
        make(lengths_of(*sizes), packing=True).enable_dynamic_batching()


def test_dynamic_batches_larger_than_planned_are_planned_for(make: Any) -> None:
    trainer = make(lengths_of(*[6] * 40, 96), per_device_train_batch_size=2)
    assert trainer.plan.batch.tokens == 102
    peak = trainer.plan.predicted_peak
    trainer.enable_dynamic_batching(max_batch_size=41)  # 192 tokens
    assert trainer.plan.batch.tokens == max(sum(len(row.input_ids) for row in rows)
                                            for rows in trainer.train_dataset.bins) > 102
    assert trainer.plan.predicted_peak > peak and trainer._window.plan is trainer.plan


def test_texts_are_chunked_without_loss_of_a_token(make: Any, bytes_tokenizer: Any) -> None:
    texts = ["".join(chr(97 + (at * 7 + n) % 26) for at in range(211 + 50 * n)) for n in range(3)]
    trainer = make([{"text": text} for text in texts], max_length=32)
    pieces = [list(entry["input_ids"]) for entry in trainer.train_dataset]
    want = [[*bytes_tokenizer(text)["input_ids"], bytes_tokenizer.eos_token_id] for text in texts]
    assert list(itertools.chain(*pieces)) == list(itertools.chain(*want))
    assert max(map(len, pieces)) <= 32


def test_rates_of_their_own(make: Any, bytes_tokenizer: Any) -> None:
    from gazelle.adapters.lora import add_lora

    for optim in ("adamw_torch", "adafactor"):  # parameters end to end, and not
        model = add_lora(small_llama(bytes_tokenizer, adapter=False, tie_word_embeddings=False), r=4,
                         modules_to_save=["embed_tokens", "lm_head"])
        before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        trainer = make(ROWS, model=model, optim="sgd" if optim == "adamw_torch" else optim, max_steps=1,
                       learning_rate=1e-3, max_grad_norm=0, weight_decay=0.0, embedding_learning_rate=1e-5,
                       loraplus_lr_ratio=16)
        trainer.train()
        groups = {group["initial_lr"]: sum(value.numel() for value in group["params"])
                  for group in trainer.optimizer.param_groups}
        assert set(groups) == {1e-3, 16e-3, 1e-5}
        after = dict(model.named_parameters())

        def moved(part: str, before: Any = before, after: Any = after) -> float:
            return max((after[name] - value).abs().max().item() for name, value in before.items() if part in name)

        if optim == "adafactor":
            continue
        plain = add_lora(small_llama(bytes_tokenizer, adapter=False, tie_word_embeddings=False), r=4,
                         modules_to_save=["embed_tokens", "lm_head"])
        start = {name: value.detach().clone() for name, value in plain.named_parameters() if value.requires_grad}
        make(ROWS, model=plain, optim="sgd", max_steps=1, learning_rate=1e-3, max_grad_norm=0, weight_decay=0.0).train()
        others = dict(plain.named_parameters())
        for part, factor in (("lora_B", 16), ("embed_tokens", 0.01), ("lm_head", 0.01)):
            assert moved(part) == pytest.approx(factor * moved(part, start, others), rel=0.02)
    with pytest.raises(OptionError, match="not trained"):
        make(ROWS, embedding_learning_rate=1e-5).train()
    with pytest.raises(OptionError, match="takes one learning rate"):
        SFTConfig(optim="galore_adamw", loraplus_lr_ratio=16)


def chain_rows(count: int, seed: int, length: int = 40) -> list[dict[str, list[int]]]:
    """Rows of a random walk over 24 tokens whose steps have probabilities of their own."""
    logits = 2.5 * torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    steps = torch.distributions.Categorical(logits=logits)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = [int(torch.randint(24, (1,), generator=generator))]
        while len(ids) < length:
            ids.append(int(torch.multinomial(steps.probs[ids[-1]], 1, generator=generator)))
        rows.append({"input_ids": [10 + token for token in ids]})
    return rows


def fresh(tokenizer: Any, **options: Any) -> Any:
    return small_llama(tokenizer, adapter=False, **{"initializer_range": 0.05} | options)


def test_a_student_learns_more_from_a_teacher(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    held_out, few = chain_rows(32, 2), chain_rows(8, 3)
    schedule: dict[str, Any] = {"learning_rate": 2e-2, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8}
    teacher = fresh(bytes_tokenizer, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    make(chain_rows(400, 4), model=teacher, max_steps=150,
         **schedule | {"learning_rate": 1e-2, "per_device_train_batch_size": 16}).train()
    small = {"num_hidden_layers": 1}
    alone = make(few, model=fresh(bytes_tokenizer, **small), max_steps=200, evaluation=held_out, **schedule)
    alone.train()
    weights = [value.clone() for value in teacher.state_dict().values()]
    taught = make(few, DistillationTrainer, model=fresh(bytes_tokenizer, **small), max_steps=200, evaluation=held_out,
                  extra={"teacher_model": teacher, "temperature": 2.0, "alpha_ce": 0.9}, **schedule)
    taught.train()
    kept = save_teacher_logits(teacher, bytes_tokenizer, few, tmp_path / "kept", top_k=8, max_length=128)
    by_kept = make(few, DistillationTrainer, model=fresh(bytes_tokenizer, **small), max_steps=200, evaluation=held_out,
                   extra={"teacher_model": kept, "temperature": 2.0, "alpha_ce": 0.9}, **schedule)
    by_kept.train()
    losses = [trainer.evaluate()["eval_loss"] for trainer in (alone, taught, by_kept)]
    assert max(losses[1:]) < losses[0] - 0.2, losses
    assert all(torch.equal(old, new) for old, new in zip(weights, teacher.state_dict().values(), strict=True))


def test_what_a_student_is_trained_on(make: Any, bytes_tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator)
    p, q = (theirs / 3).softmax(-1), (ours / 3).softmax(-1)
    want = 0.5 * 9 * (p * (p / q).log()).sum() + 0.2 * (ours - theirs).square().sum() / 11 \
        + 0.3 * -ours.log_softmax(-1)[range(7), targets].sum()
    got = distillation_loss(ours, theirs, targets, temperature=3, alpha_ce=0.5, alpha_mse=0.2)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    # Without weight for the teacher, it is training as ever; rows are packed, and those of the teacher too.
    rows = lengths_of(9, 30, 17, 4)
    plain = make(rows, model=fresh(bytes_tokenizer), max_steps=1)
    taught = make(rows, DistillationTrainer, model=fresh(bytes_tokenizer), max_steps=1, extra={
        "teacher_model": fresh(bytes_tokenizer, hidden_size=48), "alpha_ce": 0.0})
    plain.train(), taught.train()
    assert taught.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    same = make(rows, DistillationTrainer, model=fresh(bytes_tokenizer), max_steps=1,
                extra={"teacher_model": fresh(bytes_tokenizer), "alpha_ce": 0.9, "alpha_mse": 0.1})
    same.train()
    assert same.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-5)
    for wrong in ({"teacher_model": fresh(bytes_tokenizer, vocab_size=400)}, {"alpha_ce": 0.9, "alpha_mse": 0.2}):
        with pytest.raises(OptionError):
            make(rows, DistillationTrainer, model=fresh(bytes_tokenizer),
                 extra={"teacher_model": fresh(bytes_tokenizer)} | wrong)


def test_kept_logits_of_a_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = 3 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator)
    weights = {"temperature": 3.0, "alpha_ce": 0.5, "alpha_mse": 0.2}
    every = kept_distillation_loss(ours, TopLogits.of(theirs, 11), targets, **weights)
    assert every.item() == pytest.approx(distillation_loss(ours, theirs, targets, **weights).item(), rel=1e-3)
    top = theirs.topk(4).indices
    p, q = ((logits.gather(1, top) / 3).softmax(-1) for logits in (theirs, ours))
    p_all, q_all = (logits.softmax(-1).gather(1, top).sum(-1) for logits in (theirs, ours))
    shares = p_all * (p_all / q_all).log() + (1 - p_all) * ((1 - p_all) / (1 - q_all)).log()
    want = 0.5 * (9 * (p * (p / q).log()).sum() + shares.sum()) \
        + 0.2 * (ours - theirs).gather(1, top).square().sum() / 4 \
        + 0.3 * -ours.log_softmax(-1)[range(7), targets].sum()
    kept = kept_distillation_loss(ours, TopLogits.of(theirs, 4), targets, **weights)
    assert kept.item() == pytest.approx(want.item(), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 48},
                                     {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
                                     {"neftune_noise_alpha": 0.01}], ids=str)  # whose rows are padded
def test_training_by_kept_logits(make: Any, bytes_tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = lengths_of(9, 30, 17, 4, 9)
    teacher = fresh(bytes_tokenizer, hidden_size=48)
    folder = save_teacher_logits(teacher, bytes_tokenizer, rows, tmp_path / "kept", top_k=fresh_vocabulary(teacher),
                                 per_device_train_batch_size=2, **{"max_length": 128} | options)
    losses = []
    for given in (teacher, str(folder)):
        torch.manual_seed(0)
        trainer = make(rows, DistillationTrainer, model=fresh(bytes_tokenizer), evaluation=lengths_of(12),
                       extra={"teacher_model": given, "alpha_ce": 0.7, "alpha_mse": 0.2}, max_steps=3, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.evaluate()["eval_loss"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(set(losses[0])) == 3


def fresh_vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def test_kept_logits_that_do_not_fit(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    rows = lengths_of(9, 30)
    folder = tmp_path / "kept"
    save_teacher_logits(fresh(bytes_tokenizer), bytes_tokenizer, rows, folder, top_k=4, max_length=128)

    def student(rows: Any, teacher: Any = folder, model: Any = None, **extra: Any) -> Any:
        return make(rows, DistillationTrainer, model=model or fresh(bytes_tokenizer),
                    extra={"teacher_model": teacher} | extra)

    student(rows[:1]).train()
    with pytest.raises(OptionError, match="1 of 3 rows"):
        student([*rows, *lengths_of(31)])
    with pytest.raises(OptionError, match="different vocabularies"):
        student(rows, model=fresh(bytes_tokenizer, vocab_size=400))
    texts = [{"text": "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\nhere<|im_end|>\n"}]
    save_teacher_logits(fresh(bytes_tokenizer), bytes_tokenizer, texts, tmp_path / "texts", top_k=4, max_length=128)
    relabelled = student(texts, tmp_path / "texts")
    train_on_responses_only(relabelled, "<|im_start|>user\n", "<|im_start|>assistant\n")
    with pytest.raises(OptionError, match="1 of 1 rows"):
        relabelled.train()
    with pytest.raises(OptionError, match="belong to rows"):
        student(rows, data_collator=lambda entries: entries)
    with pytest.raises(ModelError, match="cannot be read"):
        student(rows, tmp_path / "nothing")
    (folder / "teacher-0001.safetensors").write_bytes(b"0" * 40)
    with pytest.raises(ModelError, match="cannot be read"):
        student(rows)
    with pytest.raises(OptionError, match="cannot be kept"):
        save_teacher_logits(fresh(bytes_tokenizer), bytes_tokenizer, rows, folder, top_k=0)


def task(name: str) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}?", "completion": f"{name[::-1]} {n * 7 % 10}{n * 3 % 10}."} for n in range(10)]


def test_replay_and_the_pull_forget_less(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    def forgotten(replay: dict[str, Any] | None) -> float:
        model = bind(fresh(bytes_tokenizer, num_hidden_layers=2))
        if replay is not None:
            model.enable_incremental_tuning(**replay)
        options: dict[str, Any] = {"model": model, "learning_rate": 4e-3, "per_device_train_batch_size": 10}
        make(task("mill"), max_steps=50, **options).train()
        trainer = make(task("crate"), max_steps=25, evaluation=task("mill"), **options)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return trainer.evaluate()["eval_loss"] - before

    plain = forgotten(None)
    replayed = forgotten({"memory_size": 5, "regularization": 0.0})
    pulled = forgotten({"memory_size": 1, "replay_strategy": "recent", "regularization": 1.0})
    assert plain > 0.3
    assert replayed < 0.7 * plain
    assert pulled < 0.7 * plain
    saved = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert saved["seen"] == [10, 10]


def test_a_run_that_ends_twice_is_remembered_once(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    """As one that was stopped and taken up again in the same process."""
    model = bind(fresh(bytes_tokenizer))
    model.enable_incremental_tuning(memory_size=50)
    trainer = make(task("mill"), model=model, max_steps=1)
    trainer.train(), trainer.train()
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["seen"] == [10]


def test_a_resumed_run_needs_the_rows_that_came_again(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    def run(steps: int, **replay: Any) -> Any:
        model = bind(fresh(bytes_tokenizer))
        model.enable_incremental_tuning(memory_size=5, **replay)
        return make(task("crate"), model=model, max_steps=steps, save_strategy="steps", save_steps=2)

    memory = Replay(5)
    memory.remember([Example([1, 2, 3], [-100, 2, 3], "a row")] * 5, 3)
    (tmp_path / "first").mkdir()
    memory.save(tmp_path / "first")
    run(2, memory=tmp_path / "first").train()
    with pytest.raises(OptionError, match="other rows of earlier runs") as caught:
        run(4).train(resume_from_checkpoint=True)
    assert (caught.value.found, caught.value.expected) == ("0 rows", "5 rows")
    again = run(4, memory=tmp_path / "first")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_what_is_remembered(tmp_path: Path) -> None:
    def rows(task: int, count: int) -> list[Example]:
        return [Example([task, number], [-100, number], f"{task}") for number in range(count)]

    for strategy, shares in (("balanced", [4, 4, 4]), ("random", [8, 2, 2]), ("recent", [0, 0, 12])):
        replay = Replay(12, strategy)
        for number, count in enumerate((80, 20, 20)):
            replay.remember(rows(number, count), seed=3)
        assert [len(task) for task in replay.tasks] == shares
        assert len({tuple(row.input_ids) for row in replay.rows}) == 12
        replay.save(tmp_path)
        assert Replay(12, strategy, memory=tmp_path).rows == replay.rows
    short = Replay(12)
    short.remember(rows(0, 2), 3), short.remember(rows(1, 50), 3)
    assert [len(task) for task in short.tasks] == [2, 10]
    (tmp_path / "replay.json").write_text("{}")
    for wrong in ({"memory_size": 0}, {"strategy": "newest"}, {"regularization": -1.0}, {"memory": tmp_path}):
        with pytest.raises(OptionError):
            Replay(**wrong)


def test_a_share_of_the_layers_is_made_again(make: Any, bytes_tokenizer: Any) -> None:
    losses, peaks = [], []
    for share, again in ((0.0, 0), (0.4, 2), (0.8, 4), (1.0, 5)):
        model = bind(small_llama(bytes_tokenizer, num_hidden_layers=5))
        model.gradient_checkpointing_enable(checkpoint_ratio=share, exclude_layers=["lm_head"])
        trainer = make(ROWS, model=model)
        assert trainer.plan.plan.keeps == (ALL,) * again + (KEEP,) * (5 - again)
        peaks.append(trainer.plan.plan.peak)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert all(loss == losses[0] for loss in losses)  # what is made again changes no bit
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    model.gradient_checkpointing_enable(checkpoint_ratio=0.4, exclude_layers=[0, "layers.2.mlp"])
    assert make(ROWS, model=model).plan.plan.keeps == (KEEP, ALL, KEEP, ALL, KEEP)
    for wrong in ({"checkpoint_ratio": 2}, {"checkpoint_ratio": 0.5, "exclude_layers": ["layers.9"]}):
        with pytest.raises(OptionError):
            model.gradient_checkpointing_enable(**wrong)


def test_types_of_a_models_parts(make: Any, bytes_tokenizer: Any) -> None:
    model = small_llama(bytes_tokenizer)
    frozen = sum(value.nbytes for value in model.parameters() if not value.requires_grad)
    set_mixed_precision(model, MixedPrecisionConfig(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16))
    assert sum(value.nbytes for value in model.parameters() if not value.requires_grad) == frozen / 2
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    assert {value.dtype for name, value in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    trainer, plain = make(ROWS, model=model, max_steps=3), make(ROWS, max_steps=3)
    trainer.train(), plain.train()
    for ours, theirs in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=0.02)
    assert all(value.grad is None or value.grad.dtype == torch.float32 for value in model.parameters())
    with pytest.raises(OptionError):
        set_mixed_precision(model, MixedPrecisionConfig(param_dtype="int8"))


def test_where_the_time_goes(make: Any) -> None:
    trainer = make(lengths_of(*[40] * 64))
    before = [value.detach().clone() for value in trainer.model.parameters()]
    random = torch.get_rng_state()
    quick = profile_io(trainer, batches=4)
    assert torch.equal(torch.get_rng_state(), random) and trainer.tokens == 0
    assert quick.batches == 4 and quick.tokens == 160 and quick.device > quick.data + quick.host
    assert "nothing to gain" in quick.advice[0]
    collate = trainer.data_collator

    def slow(entries: Any) -> Any:
        time.sleep(0.1)
        return collate(entries)

    trainer.data_collator = slow
    report = profile_io(trainer, batches=3)
    assert report.data >= 0.1 and "dataloader_num_workers=2" in str(report)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert all(value.grad is None for value in trainer.model.parameters())


def test_early_stopping_and_the_best_model(make: Any, bytes_tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 30, "learning_rate": 2e-2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "per_device_train_batch_size": 8}
    trainer = make(chain_rows(8, 3), model=with_adapter(fresh(bytes_tokenizer)), evaluation=chain_rows(16, 2),
                   **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 30
    assert losses.index(min(losses)) == len(losses) - 3  # two that were no better
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_noise_and_smoothing_do_what_they_say(make: Any) -> None:
    losses = {}
    for name, options in {"plain": {}, "noise": {"neftune_noise_alpha": 20.0},
                          "smooth": {"label_smoothing_factor": 0.2}}.items():
        trainer = make(ROWS, max_steps=1, **options)
        trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]
        assert not trainer.model.get_input_embeddings()._forward_hooks  # gone when training ends
    assert abs(losses["noise"] - losses["plain"]) > 1e-3 and math.isfinite(losses["noise"])
    assert abs(losses["smooth"] - losses["plain"]) > 1e-3
