"""The trained demo model and its exports, asked the demo's test questions: the exports in the real llama.cpp.

    python -m benchmarks.export_demo out/demo --llama .venv/llama [--out benchmarks/results/export_demo.json]

Right answers of the 80 questions for the model in memory, f16, q8_0 and q4_k_m, and how many answers are those of
transformers token for token, up to the end of turn or 48 tokens: of all questions, and of the first 20. For these also
how many are when both are made to go on behind the end of turn for 48 tokens, where the model was never trained.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gazelle.base.machine import machine_facts
from gazelle.cli.demo import PACKAGE
from gazelle.evaluate.cases import Case, read_cases
from gazelle.evaluate.metrics import accuracy
from gazelle.export.consumers import hf
from gazelle.export.consumers.llama import find_library
from gazelle.export.gguf import export_gguf
from gazelle.export.verify import run_consumer
from gazelle.models.load import load_model
from gazelle.models.special_tokens import stop_ids

TOKENS, GREEDY = 48, 20
LLAMA = ["-m", "gazelle.export.consumers", "llama"]


def request_of(prompts: list[list[int]], stops: list[int]) -> dict[str, Any]:
    """A request for answers alone."""
    return {"texts": [], "chats": [], "prompts": prompts, "tokens": TOKENS, "stops": stops, "rows": [], "kept": 0,
            "threads": torch.get_num_threads()}


def right(tokenizer: Any, answers: list[list[int]], questions: list[Case]) -> int:
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return sum(accuracy(question, text) == 1 for text, question in zip(texts, questions, strict=True))


def same(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def measure(run: Path, library: Path) -> dict[str, Any]:
    """All figures."""
    model, tokenizer = load_model(str(run), load_in_4bit=False, dtype="auto", device_map="cpu", is_trainable=False)
    model.eval()
    questions = read_cases(PACKAGE / "demo" / "test.jsonl")
    prompts = [tokenizer.apply_chat_template(question.messages, add_generation_prompt=True,
                                             return_dict=True)["input_ids"] for question in questions]
    stops = stop_ids(model.get_base_model().generation_config)
    whole, short = request_of(prompts, stops), request_of(prompts[:GREEDY], [])
    answers, wanted = (hf.ask(model, request)[0]["answers"] for request in (whole, short))
    result: dict[str, Any] = {
        "machine": machine_facts(), "library": library.name, "questions": len(questions),
        "right": {"in memory": right(tokenizer, answers, questions)}, "same_answers": {},
        f"same_answers_of_{GREEDY}": {}, f"same_{TOKENS}_tokens_of_{GREEDY}": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for path in export_gguf(model, tokenizer, scratch, "f16,q8_0,q4_k_m"):
            name = path.stem.removeprefix("model-").lower()
            where = {"path": str(path), "library": str(library)}
            found = run_consumer([sys.executable, *LLAMA], whole | where)[0]["answers"]
            result["right"][name] = right(tokenizer, found, questions)
            result["same_answers"][name] = same(answers, found)
            result[f"same_answers_of_{GREEDY}"][name] = same(answers[:GREEDY], found[:GREEDY])
            result[f"same_{TOKENS}_tokens_of_{GREEDY}"][name] = same(
                wanted, run_consumer([sys.executable, *LLAMA], short | where)[0]["answers"])
            print(json.dumps({key: value for key, value in result.items() if key != "machine"}), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--llama")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    library = find_library(options.llama)
    if library is None:
        parser.error("llama.cpp is not installed: name its folder with --llama")
    result = measure(options.run, library)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
