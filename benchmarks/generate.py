"""Throughput of answering on this machine: the demo model, transformers' `generate`, and continuous batching.

    python -m benchmarks.generate [--out benchmarks/results/generate.json] [--tokens 32] [--repeats 3]

Tokens/s of answers (prompts computed in the same time), the median of the repeats, in float32 and greedy. Every answer
has the same number of tokens: the end token is ignored. Sixteen prompts of 40 to 80 tokens:

- one by one: transformers' `generate`, and a batcher that is given one request at a time
- together: all sixteen at once, in transformers' `generate` padded, in its continuous batching, and in the batcher
- mixed: the same under four LoRA adapters and none; and transformers' `generate` with PEFT's `adapter_names`
- a beginning in common: sixteen prompts with the same first 192 tokens, with sharing and without
- `agree` says how many of the sixteen answers are, token for token, transformers' one-by-one answers
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from gazelle.base.machine import machine_facts
from gazelle.cli.demo import demo_model
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling
from gazelle.models.load import load_model

NUMBER, ADAPTERS, SHARED = 16, 4, 192
NOTE = "The river engine under the old bridge turned slowly while twelve sudden letters fell on the marble floor. "


def prompts(tokenizer: Any) -> list[list[int]]:
    found = []
    for number in range(NUMBER):
        text = f"Tell me more about item {number}. " + NOTE * (number % 3)
        found.append(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                   return_dict=True)["input_ids"])
    return found


def make_adapters(model: Any, folder: Path) -> tuple[Any, dict[str, Path]]:
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / f"a{number}", save_embedding_layers=False)
        model = adapted.unload()
    return model, {f"a{number}": folder / f"a{number}" for number in range(ADAPTERS)}


def plain(model: Any, rows: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """transformers' `generate`, on one row or on several padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens,
                         do_sample=False, pad_token_id=0, **options)
    return out[:, longest:].tolist()


def continuous(model: Any, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """transformers' own continuous batching."""
    out = model.generate_batch(
        rows, generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1,
                                                 pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4096 // 16, block_size=16, max_batch_tokens=512),
        progress_bar=False)
    return [out[key].generated_tokens for key in sorted(out, key=lambda key: int(str(key).split("_")[-1]))]


def ours(batcher: Batcher, rows: list[list[int]], tokens: int, names: list[str | None],
         at_once: int) -> list[list[int]]:
    how = Sampling(max_new_tokens=tokens, ignore_eos=True)
    answers = []
    for start in range(0, len(rows), at_once):
        requests = [batcher.submit(row, how, name) for row, name in
                    zip(rows[start:start + at_once], names[start:start + at_once], strict=True)]
        while batcher.busy:
            batcher.step()
        answers += [request.tokens for request in requests]
    return answers


def rate(work: Callable[[], list[list[int]]], repeats: int) -> tuple[float, list[list[int]]]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        answers = work()
        seconds.append(time.perf_counter() - began)
    return round(sum(map(len, answers)) / statistics.median(seconds), 1), answers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    tokens, repeats = chosen.tokens, chosen.repeats
    model, tokenizer = load_model(str(demo_model()), load_in_4bit=False, dtype="float32", device_map="cpu")
    model.eval()
    model.generation_config.eos_token_id = None
    rows, nobody = prompts(tokenizer), [None] * NUMBER
    figures: dict[str, Any] = {}

    def note(name: str, work: Callable[[], list[list[int]]], want: list[list[int]] | None = None) -> list[list[int]]:
        figures[name], answers = rate(work, repeats)
        agree = "" if want is None else f", {sum(a == b for a, b in zip(answers, want, strict=True))} agree"
        if want is not None:
            figures[f"{name}, agree"] = sum(a == b for a, b in zip(answers, want, strict=True))
        print(f"{name}: {figures[name]} tokens/s{agree}", flush=True)
        return answers

    plain(model, rows[:1], 2)
    want = note("transformers one by one", lambda: [plain(model, [row], tokens)[0] for row in rows])
    note("transformers together", lambda: plain(model, rows, tokens), want)
    note("transformers' continuous batching", lambda: continuous(model, rows, tokens), want)
    fresh = {"max_context": 1024, "cache_tokens": NUMBER * 1024}
    with Batcher(model, tokenizer, share_prefixes=False, **fresh) as batcher:
        note("one by one", lambda: ours(batcher, rows, tokens, nobody, 1), want)
        note("together", lambda: ours(batcher, rows, tokens, nobody, NUMBER), want)
    begin = tokenizer(NOTE * 40)["input_ids"][:SHARED]
    long = [begin + row for row in rows]
    for share in (True, False):
        def anew(share: bool = share) -> list[list[int]]:
            with Batcher(model, tokenizer, share_prefixes=share, **fresh) as batcher:
                return ours(batcher, long, tokens, nobody, NUMBER)
        note(f"together, a beginning in common, {'shared' if share else 'not shared'}", anew)
    with tempfile.TemporaryDirectory() as scratch:
        model, folders = make_adapters(model, Path(scratch))
        names = [(None, *folders)[number % (ADAPTERS + 1)] for number in range(NUMBER)]
        with Batcher(model, tokenizer, adapters=folders, share_prefixes=False, **fresh) as batcher:
            mixed = note("together, five adapters mixed", lambda: ours(batcher, rows, tokens, names, NUMBER))
        for name, path in folders.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name).eval()
        peft_names = [name or "__base__" for name in names]
        note("transformers together, five adapters mixed by PEFT",
             lambda: plain(model, rows, tokens, adapter_names=peft_names), mixed)
    figures["together / one by one"] = round(figures["together"] / figures["one by one"], 2)
    figures["together / transformers one by one"] = round(figures["together"] / figures["transformers one by one"], 2)
    result = {"machine": machine_facts(), "threads": torch.get_num_threads(), "prompts": NUMBER,
              "prompt_tokens": [len(row) for row in rows], "answer_tokens": tokens, "repeats": repeats,
              "shared_tokens": SHARED, "tokens_per_second": figures}
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
