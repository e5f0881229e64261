"""`EvaluationPipeline` on real models, and its report."""

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from gazelle import EvaluationPipeline, accelerate
from gazelle.base.errors import DataError, OptionError
from gazelle.evaluate.answerers import Answerer, LocalModel, Reply
from gazelle.evaluate.cases import Case, read_cases
from gazelle.evaluate.judge import grade_in
from gazelle.evaluate.metrics import METRICS
from gazelle.evaluate.report import EvaluationReport, shown
from gazelle.evaluate.statistics import Estimate


class Parrot(Answerer):
    """Says what it was given to say, in the order of the cases."""

    def __init__(self, *says: str) -> None:
        self.says, self.asked, self.is_open = says, 0, False

    def open(self) -> None:
        assert not self.is_open
        self.is_open, self.runs_on = True, "a perch"

    def close(self) -> None:
        self.is_open = False

    def ask(self, cases: Any, max_new_tokens: int, timed: Any = ()) -> list[Reply]:
        assert self.is_open
        self.asked += len(cases)
        return [Reply(self.says[number % len(self.says)], *((0.1, 0.5 + number, 4) if number in timed else ()))
                for number in range(len(cases))]


CASES = [
    {"input": "Capital of France?", "expected": "Paris", "category": "west"},
    {"input": "Capital of Italy?", "expected": ["Rome", "Roma"], "category": "west"},
    {"input": "Capital of | <b>Japan</b>?", "expected": "Tokyo", "category": "east"},
    {"input": "中国的首都?", "expected": "北京", "category": "east"},
]


def report(**options: Any) -> EvaluationReport:
    return EvaluationPipeline(models={"first": Parrot("Paris", "Milan", "<script>alert(1)</script> | Kyoto", "上海"),
                                      "second": Parrot("It is Paris.", "Roma", "Tokyo", "是上海")},
                              test_cases=CASES, metrics=["accuracy", "token_f1", "latency"], timed_cases=2,
                              **options).run()


def test_figures_by_hand() -> None:
    found = report()
    first, second = found.results
    assert first.scores["accuracy"] == [1, 0, 0, 0] and second.scores["accuracy"] == [1, 1, 1, 0]
    assert first.overall["accuracy"] is not None and first.overall["accuracy"].value == 0.25
    assert {name: scores["accuracy"] and scores["accuracy"].value for name, scores in second.by_category.items()} \
        == {"west": 1.0, "east": 0.5}
    assert first.scores["latency"] == [0.5, None, 2.5, None]  # two of four, spread
    assert found.failures("first") == [1, 2, 3] and found.failures("second") == [3]
    accuracy = next(one.difference for one in found.comparisons if one.metric == "accuracy")
    assert (accuracy.value, accuracy.better, accuracy.worse, accuracy.p) == (0.5, 2, 0, 0.5)
    assert found.settings["timed_cases"] == 2 and first.runs_on == "a perch"


def test_failures_are_worst_first() -> None:
    found = EvaluationPipeline(Parrot("no idea", "it is red and blue", "", "red and green"), test_cases=[
        {"input": str(number), "expected": "red and green", "keys": ["red", "green"]} for number in range(4)],
        metrics=["key_coverage", "token_f1"]).run()
    assert found.failures("model") == [0, 2, 1]
    assert found.results[0].scores["key_coverage"] == [0, 0.5, 0, 1]


def test_markdown_and_html_hold_what_was_found_and_run_nothing() -> None:
    found = report()
    text, page = found.to_markdown(), found.to_html()
    assert "| accuracy ↑ | 25% [5%, 70%] | 75% [30%, 95%] |" in text
    assert "| accuracy | second | +50 points [+0 points, +100 points] | 2 | 0 | 0.5 | McNemar, exact |" in text
    assert "## accuracy by category" in text and "| east (2) | 0% [0%, 66%] | 50% [9%, 91%] |" in text
    assert "Capital of \\| &lt;b>Japan&lt;/b>?" in text and "<script" not in text
    assert all(line.count(" | ") == 3 for line in text.splitlines() if "Kyoto" in line)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 3 and "75%" in page
    HTMLParser().feed(page)
    for tag in ("table", "tr", "td", "div", "details", "th"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert not re.search(r"(src|href)=\"http", page)


def test_json_holds_every_answer(tmp_path: Path) -> None:
    votes = tmp_path / "out" / "votes.jsonl"
    votes.parent.mkdir()
    votes.write_text("kept")
    folder = report().save(tmp_path / "out")
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["cases"][3]["answers"] == {"first": "上海", "second": "是上海"}
    assert content["cases"][1]["scores"]["second"]["accuracy"] == 1
    assert content["models"]["first"]["overall"]["accuracy"]["count"] == 4
    assert content["comparisons"][0]["p"] == 0.5 and content["machine"]["versions"]["gazelle"]
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.md", "evaluation.html",
                                                        "scores.png", "categories.png", "times.png", "votes.jsonl"}
    assert votes.read_text() == "kept"
    for path in folder.glob("*.png"):
        image = imread(path)
        assert image.shape[0] > 100 and image[..., :3].std() > 0.05, path


def test_a_model_learns_nothing_and_knows_paris(demo_model: Callable[[], Any], demo_tokenizer: Any) -> None:
    model = demo_model()
    found = EvaluationPipeline(
        model=model, tokenizer=demo_tokenizer, max_new_tokens=8, timed_cases=1,
        test_cases=[{"input": "What is the capital of France?", "expected": "Paris"},
                    {"input": "What is the capital of France?", "expected": "Vessenbrook"}],
        metrics=["accuracy", "latency", "first_token", "tokens_per_second", "peak_memory", "perplexity"]).run()
    result = found.results[0]
    assert result.scores["accuracy"] == [1, 0]
    assert result.replies[0].text == result.replies[1].text
    latency, first = result.scores["latency"][0], result.scores["first_token"][0]
    assert latency is not None and first is not None and 0 < first < latency < 60
    assert result.scores["latency"][1] is None
    assert result.replies[0].tokens is not None and 4 <= result.replies[0].tokens <= 8
    memory = result.overall["peak_memory"]
    if memory is not None:
        assert 134_515_008 * 4 <= memory.value < 3e9
    assert not model.training


def test_perplexity_is_hugging_faces_loss(tiny: Any, demo_tokenizer: Any) -> None:
    case, = read_cases([{"input": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                                   {"role": "user", "content": "What is red?"}], "expected": ["A crate.", "x"]}])
    told = LocalModel(tiny, demo_tokenizer).surprise([case])
    prompt = demo_tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, return_dict=True).input_ids
    answer = demo_tokenizer("A crate.<|im_end|>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        loss = tiny(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    assert told is not None
    assert told[0][1] == len(answer)
    assert told[0][0] / told[0][1] == pytest.approx(float(loss), abs=1e-5)
    on_engine = LocalModel(accelerate(tiny), demo_tokenizer).surprise([case])
    assert on_engine is not None and on_engine[0] == pytest.approx(told[0], rel=1e-5)


def test_a_base_model_without_a_template_goes_on_with_the_text(tiny: Any, demo_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = None
    case, = read_cases([{"input": "The crate is", "expected": " red"}])
    answerer = LocalModel(tiny, tokenizer)
    ids = tokenizer("The crate is")["input_ids"]
    mask = torch.ones(1, len(ids), dtype=torch.long)
    want = tiny.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=4, do_sample=False)[0, len(ids):]
    assert answerer.ask([case], 4)[0].text == tokenizer.decode(want, skip_special_tokens=True)
    told = answerer.surprise([case])
    target = [*tokenizer(" red", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        loss = tiny(input_ids=torch.tensor([ids + target]), labels=torch.tensor([[-100] * len(ids) + target])).loss
    assert told is not None and told[0][0] / told[0][1] == pytest.approx(float(loss), abs=1e-5)


def test_folders_are_loaded_when_it_is_their_turn(tiny_folder: Path, tiny: Any, demo_tokenizer: Any) -> None:
    pipeline = EvaluationPipeline(models={"folder": str(tiny_folder), "memory": (tiny, demo_tokenizer)},
                                  test_cases=CASES[:2], metrics=["exact_match", "perplexity"], max_new_tokens=4)
    found = pipeline.run()
    folder = pipeline.answerers["folder"]
    assert isinstance(folder, LocalModel) and folder.model is None
    assert [reply.text for reply in found.results[0].replies] == [reply.text for reply in found.results[1].replies]
    assert found.results[0].scores["perplexity"] == pytest.approx(found.results[1].scores["perplexity"], rel=1e-5)


def test_judges() -> None:
    def polite(case: Case, answer: str) -> float:
        return 1.0 if case.question and answer.startswith("It is") else 0.25

    found = report(judge=polite)
    assert found.results[1].scores["judge"] == [1.0, 0.25, 0.25, 0.25]
    model = Parrot("10", "I would say 4/10.", "Grade: 1", "none")
    found = report(judge=model)
    assert found.results[0].scores["judge"] == [1.0, pytest.approx(1 / 3), 0.0, None]
    assert model.asked == 8 and not model.is_open
    with pytest.raises(OptionError, match="the judge gave no grade"):
        report(judge=lambda _case, _answer: 7)
    with pytest.raises(OptionError, match="has no judge"):
        EvaluationPipeline(Parrot("x"), test_cases=CASES, metrics=["judge"])


@pytest.mark.parametrize(("said", "grade"), [
    ("7", 6 / 9), ("7/10", 6 / 9), ("**8.5**", 7.5 / 9), ("Score: 1", 0), ("10.", 1), ("11", None), ("0", None),
    ("-3", None), ("great", None), ("", None),
])
def test_grades(said: str, grade: float | None) -> None:
    assert grade_in(said) == (None if grade is None else pytest.approx(grade))


def test_the_judge_sees_question_reference_and_answer(tiny: Any) -> None:
    class Listener(Parrot):
        def ask(self, cases: Any, max_new_tokens: int, timed: Any = ()) -> list[Reply]:
            self.prompts = [case.question for case in cases]
            return super().ask(cases, max_new_tokens, timed)

    judge = Listener("5")
    report(judge=judge)
    assert "Capital of Italy?" in judge.prompts[1]
    assert "Rome or Roma" in judge.prompts[1] and "Milan" in judge.prompts[1]


@pytest.mark.parametrize(("options", "said"), [
    ({"metrics": ["acuracy"]}, "no such metric"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"confidence": 1.5}, "confidence"), ({"test_cases": None}, "test_cases"), ({"models": {}}, "no model"),
])
def test_mistakes_are_found_before_anything_is_asked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        EvaluationPipeline(**{"models": {"a": Parrot("x")}, "test_cases": CASES} | options)
    assert said in str(caught.value)


def test_a_case_without_an_answer_is_named() -> None:
    with pytest.raises(DataError, match="accuracy needs 'expected'") as caught:
        EvaluationPipeline(Parrot("x"), test_cases=[*CASES, {"input": "?"}])
    assert caught.value.where == "row 5"
    found = EvaluationPipeline(Parrot("x"), test_cases=[{"input": "?"}], metrics=["length"]).run()
    assert found.failures("model") == []


def test_a_model_needs_its_tokenizer(tiny: Any) -> None:
    with pytest.raises(OptionError, match="without its tokenizer"):
        EvaluationPipeline(tiny, test_cases=CASES)


def test_units() -> None:
    assert shown(METRICS["accuracy"], Estimate(0.5, 0.25, 0.75)) == "50% [25%, 75%]"
    assert shown(METRICS["first_token"], Estimate(0.0123)) == "0.012 s"
    assert shown(METRICS["peak_memory"], Estimate(1.5e9)) == "1.50 GB"
    assert shown(METRICS["perplexity"], Estimate(1234.56)) == "1,234.6"
    assert shown(METRICS["accuracy"], None) == "–"


def test_an_answer_in_a_table_cannot_steer_the_terminal() -> None:
    found = EvaluationPipeline(Parrot("\x1b[2Jgone\x9b1m\x07"), test_cases=CASES, metrics=["accuracy"]).run()
    text = found.to_markdown()
    assert "[2Jgone1m" in text and not set(text) & {"\x1b", "\x9b", "\x07"}


def test_two_functions_of_one_name_are_two_metrics_or_none() -> None:
    with pytest.raises(OptionError, match="name of another metric"):
        EvaluationPipeline(Parrot("x"), test_cases=CASES, metrics=[lambda _, __: 0.0, lambda _, __: 1.0])
