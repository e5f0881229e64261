"""The advisor names each fault in runs that have it, and nothing in runs that have none; it says a thing once."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import ROWS, small_llama
from tests.train.synthetic_runs import Entries, log_of, settling, stairs, through
from transformers import PreTrainedTokenizerBase

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import OptionError
from gazelle.train.advice.advisor import Watch, advise
from gazelle.train.advice.findings import KINDS, STOPPING, Facts, Finding
from gazelle.train.metrics import read_metrics

Make = Callable[[int], Entries]
THREE = Facts(max_steps=600, epochs=3, examples=2_000, labelled_tokens=200_000, schedule="cosine")
ONE = Facts(max_steps=600, epochs=1, examples=9_600, labelled_tokens=900_000, schedule="cosine")
CONSTANT = Facts(max_steps=600, epochs=1, schedule="constant")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

FAULTY: dict[tuple[str, str], tuple[Make, Facts]] = {
    ("divergence", "late and slow"): (lambda seed: log_of(
        through((0, 2), (.2, 1.2), (.5, 1.1), (.6, 1.5), (.7, 3), (1, 7)), seed=seed, noise=.08, kind="constant",
        norm=through((0, .6), (.5, .6), (.6, 4), (1, 30))), CONSTANT),
    ("divergence", "at the end of warm-up"): (lambda seed: log_of(
        through((0, 2.3), (.05, 2.1), (.08, 4), (.12, 7.2), (1, 6.8)), seed=seed, evals=4,
        held=through((0, 2.3), (.05, 2.1), (.1, 7), (1, 6.9))), THREE),
    ("divergence", "no number"): (lambda seed: [
        entry | ({"loss": None} if "loss" in entry and entry["step"] > 300 else {})
        for entry in log_of(settling(2, 1), seed=seed)], THREE),
    ("spike", "one line"): (lambda seed: log_of(
        settling(1.8, 1), seed=seed, jumps={60: 3}, norm_jumps={60: 8}, held=settling(1.8, 1.05)), THREE),
    ("spike", "three lines of a noisy run"): (lambda seed: log_of(
        settling(1.8, 1), seed=seed, noise=.08, jumps={70: 4, 71: 3, 72: 2.2}), THREE),
    ("spike", "of the gradient"): (lambda seed: log_of(settling(1.8, 1), seed=seed, norm_jumps={50: 60}), THREE),
    ("overfitting", "six epochs"): (lambda seed: log_of(
        stairs(1.6, [1.2, .8, .45, .25, .15, .1]), seed=seed, evals=6, epochs=6,
        held=through((0, 1.6), (1 / 6, 1.15), (1 / 3, 1.1), (.5, 1.2), (1, 1.8))), THREE),
    ("overfitting", "slow, evaluated often"): (lambda seed: log_of(
        settling(2.2, .9, .2, .5), seed=seed, held=through((0, 2.2), (.3, 1.2), (.5, 1.15), (1, 1.4)), evals=20,
        epochs=4, kind="constant"), CONSTANT),
    ("overfitting", "from the second epoch on"): (lambda seed: log_of(
        stairs(2, [1.4, .7, .3]), seed=seed, held=through((0, 2), (1 / 3, 1.3), (2 / 3, 1.5), (1, 2)), noise=.1),
        THREE),
    ("too little data", "twenty rows"): (lambda seed: log_of(
        stairs(2.5, [2, 1.6, 1.2]), seed=seed, steps=30, every=1),
        Facts(max_steps=30, epochs=3, examples=20, labelled_tokens=900)),
    ("too little data", "learnt by heart"): (lambda seed: log_of(
        stairs(1.9, [1.6, .9, .4, .3]), seed=seed, held=through((0, 1.9), (.25, 1.5), (1, 1.49)), evals=4, epochs=4),
        Facts(max_steps=600, epochs=4, examples=200, labelled_tokens=20_000)),
    ("too little data", "learnt by heart, noisy"): (lambda seed: log_of(
        stairs(3, [2.2, 1.2, .5]), seed=seed, held=through((0, 3), (1 / 3, 2), (1, 2)), evals=6, noise=.1), THREE),
    ("loss near zero", "the answer is in the prompt"): (lambda seed: log_of(
        settling(.5, .004, .03, 0), seed=seed, epochs=1, noise=.2), ONE),
    ("loss near zero", "all is learnt in the second epoch"): (lambda seed: log_of(
        settling(2.5, .008, .08, 0), seed=seed, epochs=5, noise=.15, held=settling(2.5, .02, .08, 0), evals=5),
        Facts(max_steps=600, epochs=5)),
    ("plateau", "never moves"): (lambda seed: log_of(
        through((0, 2.3), (1, 2.29)), seed=seed, noise=.025, peak=1e-7), ONE),
    ("plateau", "stuck"): (lambda seed: log_of(
        settling(2.3, 1.4, .06, 0), seed=seed, noise=.02, kind="constant", every=2), CONSTANT),
    ("plateau", "stuck, held out too"): (lambda seed: log_of(
        settling(2.3, 1.4, .05, 0), seed=seed, noise=.02, kind="constant", every=2, evals=10, held_noise=.001,
        held=settling(2.3, 1.45, .05, 0)), CONSTANT),
    ("underfitting", "too few steps"): (lambda seed: log_of(
        through((0, 3), (1, 1.8)), seed=seed, noise=.03, epochs=1, kind="constant"), CONSTANT),
    ("underfitting", "a rate too low"): (lambda seed: log_of(
        through((0, 2.5), (1, 2.2)), seed=seed, noise=.01, epochs=1, kind="constant", peak=1e-6,
        held=through((0, 2.5), (1, 2.22))), CONSTANT),
    ("underfitting", "cut short by the schedule"): (lambda seed: log_of(
        settling(3, .6, 1.2, 0), seed=seed, noise=.03, epochs=1, kind="linear"), ONE),
}

HEALTHY: dict[str, tuple[Make, Facts]] = {
    "one epoch, cosine to zero": (lambda seed: log_of(
        settling(1.6, 1, .04), seed=seed, epochs=1, held=settling(1.6, 1.02, .04), evals=6), ONE),
    "a line a step, noisy": (lambda seed: log_of(settling(1.6, 1, .04), seed=seed, epochs=1, noise=.15, every=1), ONE),
    "a line a step, very noisy": (lambda seed: log_of(
        settling(1.6, 1, .04), seed=seed, epochs=1, noise=.35, every=1), ONE),
    "stairs of three epochs": (lambda seed: log_of(
        stairs(1.6, [1.1, .9, .72]), seed=seed, held=through((0, 1.6), (1 / 3, 1.05), (2 / 3, 1), (1, 1.015))), THREE),
    "stairs, nothing held out": (lambda seed: log_of(stairs(1.6, [1.1, .9, .72]), seed=seed, kind="linear"), THREE),
    "low from the start": (lambda seed: log_of(
        settling(.42, .33, .1, .05), seed=seed, held=settling(.42, .34, .1, .03)), THREE),
    "thirty steps": (lambda seed: log_of(
        settling(2.4, .9, .2, 0), seed=seed, steps=30, every=1, noise=.1, kind="linear"),
        Facts(max_steps=30, epochs=1, examples=240)),
    "linear, evaluated often": (lambda seed: log_of(
        settling(2, 1.2, .1), seed=seed, kind="linear", held=settling(2, 1.2, .1), evals=12), THREE),
    "constant rate": (lambda seed: log_of(
        settling(2, 1.2, .15, .1), seed=seed, kind="constant", epochs=1, held=settling(2, 1.2, .15, .1), evals=12),
        CONSTANT),
    "facts learnt by heart that answer other questions": (lambda seed: log_of(
        settling(3.7, .06, .18, 0), seed=seed, steps=100, noise=.15, held=settling(3.4, .05, .2, 0), evals=2, epochs=2,
        kind="linear"), Facts(max_steps=100, epochs=2, examples=408, labelled_tokens=6_000)),
    "learnt by heart, and held-out loss still gains": (lambda seed: log_of(
        settling(3, .008, .1, 0), seed=seed, noise=.15, held=through((0, 3), (1 / 3, .5), (2 / 3, .12), (1, .06))),
        THREE),
    "norms that wander": (lambda seed: log_of(settling(1.8, 1), seed=seed, norm_jumps={20: 4, 55: 5, 90: 4}), THREE),
    "a thousand lines": (lambda seed: log_of(
        settling(2.5, 1.6, .1), seed=seed, steps=1_000, every=1, noise=.12, epochs=1, held=settling(2.5, 1.62, .1),
        evals=15), Facts(max_steps=1_000, epochs=1)),
    "rows that get harder on purpose": (lambda seed: log_of(
        through((0, 1.2), (.1, .8), (.5, 1), (1, 1.15)), seed=seed, epochs=1), Facts(max_steps=600, ordered=True)),
    "held-out loss that wanders": (lambda seed: log_of(
        settling(1.8, 1), seed=seed, held=settling(1.8, 1.05), held_noise=.03, evals=20), THREE),
}
FEW, MANY = 2, 40  # seeds


def kinds(entries: Entries, facts: Facts | None) -> list[str]:
    return [finding.kind for finding in advise(entries, facts)]


def named(kind: str, name: str, seeds: int) -> None:
    make, facts = FAULTY[kind, name]
    assert [kinds(make(seed), facts) for seed in range(seeds)] == [[kind]] * seeds


def silent(name: str, seeds: int) -> None:
    make, facts = HEALTHY[name]
    assert [[finding.line() for finding in advise(make(seed), facts)] for seed in range(seeds)] == [[]] * seeds


@pytest.mark.parametrize(("kind", "name"), FAULTY, ids=": ".join)
def test_a_fault_is_named_and_nothing_else(kind: str, name: str) -> None:
    named(kind, name, FEW)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name: str) -> None:
    silent(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FAULTY, ids=": ".join)
def test_a_fault_is_named_in_many(kind: str, name: str) -> None:
    """In nine of ten at least: some noise hides a fault."""
    make, facts = FAULTY[kind, name]
    assert sum(kinds(make(seed), facts) == [kind] for seed in range(MANY)) >= 0.9 * MANY


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_many_healthy_runs_are_left_alone(name: str) -> None:
    silent(name, MANY)


def test_noise_is_not_measured_over_too_few_lines() -> None:
    """In one 64 lines happen to be half as noisy as all, before one of four times the loss; in one the last ten."""
    for name, seed in (("a line a step, very noisy", 23), ("thirty steps", 39)):
        make, facts = HEALTHY[name]
        assert advise(make(seed), facts) == []


def test_every_fault_has_two_runs_or_more() -> None:
    assert all(sum(kind == fault for fault, _ in FAULTY) >= 2 for kind in KINDS)


# One side of a limit and the other: what turns one into the other is the fault, and nothing besides.
LIMITS: dict[str, tuple[Facts, Make, Make]] = {
    "overfitting": (THREE, *(
        lambda seed, last=last: log_of(stairs(1.6, [1.1, .9, .72]), seed=seed, held_noise=.001, evals=6,  # type: ignore[misc]
                                       held=through((0, 1.6), (1 / 3, 1.05), (2 / 3, 1), (1, last)))
        for last in (1.02, 1.15))),
    "divergence": (THREE, *(
        lambda seed, last=last: log_of(through((0, 2), (.3, 1.5), (.6, 1.5), (.7, last), (1, last)), seed=seed,  # type: ignore[misc]
                                       noise=.02)
        for last in (1.65, 2.2))),
    "spike": (THREE, *(
        lambda seed, times=times: log_of(settling(1.8, 1), seed=seed, jumps={60: times}) for times in (1.3, 2.2))),  # type: ignore[misc]
    "too little data": (THREE, *(
        lambda seed, last=last: log_of(stairs(1.9, [1.6, 1.2, last]), seed=seed, epochs=3,  # type: ignore[misc]
                                       held=through((0, 1.9), (1 / 3, 1.5), (1, 1.49)))
        for last in (.95, .6))),
    "loss near zero": (ONE, *(
        lambda seed, last=last: log_of(settling(2, last, .05, 0), seed=seed, epochs=1) for last in (.04, .012))),  # type: ignore[misc]
    "underfitting": (ONE, *(
        lambda seed, time=time: log_of(settling(3, .6, time, 0), seed=seed, noise=.02, epochs=1)  # type: ignore[misc]
        for time in (.3, 1.5))),
    "plateau": (CONSTANT, *(
        lambda seed, slope=slope: log_of(settling(2.3, 1.4, .05, slope), seed=seed, noise=.01, kind="constant", every=2)  # type: ignore[misc]
        for slope in (.25, 0))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_of_a_limit(kind: str) -> None:
    facts, below, above = LIMITS[kind]
    for seed in range(FEW):
        assert (kinds(below(seed), facts), kinds(above(seed), facts)) == ([], [kind])


def test_falling_is_not_rising() -> None:
    """Curves turned upside down are no faults."""
    for held in (through((0, 1.8), (.5, 1.2), (1, 1)), through((0, 1.8), (.5, 1), (1, 1))):
        assert kinds(log_of(settling(1.8, 1), seed=1, held=held, evals=8), THREE) == []
    assert kinds(log_of(through((0, 7), (.2, 5), (.4, 1.5), (1, 1.4)), seed=1), THREE) == []
    assert kinds(log_of(settling(1.8, 1), seed=1, jumps={60: 1 / 3}, norm_jumps={60: 1 / 60}), THREE) == []


def test_the_demo_is_healthy() -> None:
    """The curves of a real run, and the advice that it was given then."""
    result = json.loads((RESULTS / "recommend.json").read_text(encoding="utf-8"))
    assert sum("loss" in entry for entry in result["metrics"]) > 24
    assert advise(result["metrics"], Facts(examples=367, labelled_tokens=6_294, epochs=3)) == []
    assert result["advice"] == []


def test_what_is_said_has_figures_and_a_remedy() -> None:
    def one(kind: str, name: str) -> Finding:
        make, facts = FAULTY[kind, name]
        (finding,) = advise(make(0), facts)
        return finding

    finding = one("divergence", "late and slow")
    assert "learning_rate to 6.7e-5 (a third)" in finding.remedy and 300 < finding.step < 420
    finding = one("overfitting", "six epochs")
    assert "num_train_epochs to 2" in finding.remedy and "load_best_model_at_end=True" in finding.remedy
    assert finding.step == 300 and re.search(r"held-out loss was 1\.\d+ at step 200 and is 1\.2", finding.seen)
    assert "step 305" in one("spike", "one line").seen
    assert re.search(r"max_grad_norm to 0\.[4-8]\d?, or learning_rate", one("spike", "of the gradient").remedy)
    assert "max_grad_norm to 0.3, or learning_rate to 1.0e-4" in one("spike", "one line").remedy
    make, facts = FAULTY["spike", "one line"]
    assert "max_grad_norm" not in advise(make(0), replace(facts, max_grad_norm=0.3))[0].remedy  # it is that already
    assert "learning_rate to 5.0e-7 (five times)" in one("plateau", "never moves").remedy
    assert 'lr_scheduler_type="cosine"' in one("plateau", "stuck").remedy
    assert "learning_rate to 2.0e-6 (twice)" in one("underfitting", "a rate too low").remedy
    assert "num_train_epochs to 2" in one("underfitting", "too few steps").remedy
    assert "100 rows" in one("too little data", "twenty rows").remedy
    assert "--dry-run" in one("loss near zero", "the answer is in the prompt").remedy
    assert one("loss near zero", "all is learnt in the second epoch").step < 450


def test_a_log_without_facts_and_an_odd_one() -> None:
    """What transformers keeps as `log_history` has no schedule and no data; NaN is null in a metrics file."""
    make, _ = FAULTY["overfitting", "six epochs"]
    assert kinds(make(3), None) == ["overfitting"]
    assert advise([]) == []
    bare = [{"step": step, "loss": 1.0} for step in range(4)] + [{"step": 4, "eval_loss": math.nan}, {"x": "y"}]
    assert advise(bare) == []
    assert kinds([{"step": step, "eval_loss": loss} for step, loss in enumerate((2.0, 1.0, 1.5, 1.6))], None) == []
    for losses, wanted in (([1.0, math.nan, math.nan], ["divergence"]),
                           ([1.0] * 9 + [math.nan] + [1.0] * 3, ["spike"]), ([1.0, None, 1.0], [])):
        assert kinds([{"step": number, "loss": loss} for number, loss in enumerate(losses)], None) == wanted


def test_each_set_that_is_held_out_is_watched() -> None:
    entries = log_of(stairs(1.6, [1.2, .8, .45, .25]), seed=0, evals=4, epochs=4, held=settling(1.6, 1.2))
    worse = iter((1.2, 1.1, 1.3, 1.6))
    for entry in entries:
        if "eval_loss" in entry:
            entry["eval_books_loss"] = next(worse)
    (finding,) = advise(entries, THREE)
    assert finding.kind == "overfitting" and "held-out loss on books" in finding.seen


def test_state_goes_on_where_it_was() -> None:
    """Cut anywhere, a run is told the same, and what was said before is not said again."""
    for kind, name in (("overfitting", "six epochs"), ("spike", "one line")):
        make, facts = FAULTY[kind, name]
        entries = make(1)
        whole = advise(entries, facts)
        for cut in (0, 1, len(entries) // 2, len(entries) - 1):
            first, second = Watch(facts), Watch(facts)
            before = [finding for entry in entries[:cut] for finding in first.take(entry)]
            second.curves.load_state_dict(first.curves.state_dict())
            second.findings = list(first.findings)
            assert before + [finding for entry in entries[cut:] for finding in second.take(entry)] == whole


def rows_of(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows with a rule that can be learnt: the answer is the question's word again, as often as it says."""
    words = ("teal", "nine", "mill", "red", "shelf", "volt")
    return [{"instruction": f"{words[n % 6]} {n % 3 + 1}", "output": " ".join([words[n % 6]] * (n % 3 + 1))}
            for n in range(first, first + count)]


def train(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Any, held: Any, **options: Any) -> SFTTrainer:
    settings = {"per_device_train_batch_size": 4, "max_length": 128, "report": False, "disable_tqdm": True,
                "save_strategy": "no", "logging_steps": 1, "output_dir": str(folder), "max_grad_norm": 1.0,
                "eval_strategy": "epoch" if held else "no"}
    model = small_llama(tokenizer, adapter=False, num_hidden_layers=2)
    trainer = SFTTrainer(model, SFTConfig(**(settings | options)), rows, held, tokenizer)
    trainer.train()
    return trainer


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_that_overfits_is_stopped_and_saved(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    """Eight facts learnt by heart, asked others."""
    trainer = train(bytes_tokenizer, tmp_path, ROWS[:4] * 2, ROWS[4:], num_train_epochs=60, learning_rate=5e-3,
                    lr_scheduler_type="constant", advisor="stop", report=True, report_samples=0)
    found = {finding.kind: finding for finding in trainer._advisor.findings}
    assert list(found) == ["too little data", "overfitting"]
    assert trainer._advisor.stopped == found["overfitting"] and "overfitting" in STOPPING
    assert trainer.state.global_step == found["overfitting"].step < trainer.state.max_steps == 120
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{trainer.state.global_step}"]
    said = [record.getMessage() for record in caplog.records if "Advice at" in record.getMessage()]
    assert len(said) == 2 and "held-out loss was" in said[1]
    assert "Training stops at step" in caplog.text
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Advice</h2>" in page and "Training was stopped for it." in page and "Overfitting" in page
    assert trainer.model.gazelle_run["facts"][-1] == ("stopped by the advisor", "overfitting")
    told = advise(read_metrics(tmp_path / "metrics.jsonl"), trainer._advisor.watch.facts)
    assert told == trainer._advisor.findings


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_that_diverges(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A rate a thousand times too high; what is saved before stays, and no ruined checkpoint comes."""
    trainer = train(bytes_tokenizer, tmp_path, rows_of(120), None, max_steps=60, learning_rate=2.0, warmup_steps=12,
                    lr_scheduler_type="constant_with_warmup", optim="sgd", spike_factor=0, advisor="stop",
                    max_grad_norm=0.0, save_strategy="steps", save_steps=5)
    assert [finding.kind for finding in trainer._advisor.findings] == ["divergence"]
    assert trainer.state.global_step == trainer._advisor.findings[0].step < 60
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert last < trainer.state.global_step and last % 5 == 0


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_that_is_healthy(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A rule that held-out rows follow too."""
    trainer = train(bytes_tokenizer, tmp_path, rows_of(160), rows_of(18, 160), num_train_epochs=3, learning_rate=1e-2,
                    lr_scheduler_type="linear", warmup_steps=6, report=True, report_samples=0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer._advisor.findings == []
    assert "<h2>Advice</h2>" not in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("one_thread")
def test_a_test_set_afterwards_is_no_overfitting(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(bytes_tokenizer, tmp_path, rows_of(60), rows_of(6), max_steps=4, learning_rate=1e-2,
                    eval_strategy="steps", eval_steps=2)
    (last,) = [entry["eval_loss"] for entry in trainer.state.log_history if entry.get("eval_loss")][-1:]
    assert trainer.evaluate(ROWS)["eval_loss"] > 1.12 * last
    assert trainer._advisor.findings == [] and "Advice" not in caplog.text


@pytest.mark.usefixtures("one_thread")
def test_off_is_off(bytes_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = train(bytes_tokenizer, tmp_path, ROWS[:4], None, max_steps=2, advisor="off")
    assert trainer._advisor.findings == []
    with pytest.raises(OptionError, match="advisor"):
        SFTConfig(advisor="shout", output_dir=str(tmp_path))
