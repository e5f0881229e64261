"""The text that is trained on: the sources of this Python's own standard library, cut into rows of token ids."""

import random
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

SHORTEST = 24  # tokens of a row in the short workload


@cache
def library_text(files: int | None = 120) -> str:
    """The first modules of the standard library, by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def lengths(workload: str, sequence: int, count: int) -> list[int]:
    """Tokens of each row: all `sequence`, or drawn from lognormal(5.0, 0.8), the shape of instruction data."""
    if workload == "dense":
        return [sequence] * count
    draw = random.Random(0)
    return [min(sequence, max(SHORTEST, int(draw.lognormvariate(5.0, 0.8)))) for _ in range(count)]


def rows(tokenizer: Any, workload: str, sequence: int, count: int) -> list[list[int]]:
    """Consecutive pieces of the text; from the start again where it ends."""
    ids = tokenizer(library_text(), add_special_tokens=False, verbose=False)["input_ids"]
    found, at = [], 0
    for length in lengths(workload, sequence, count):
        if at + length > len(ids):
            at = 0
        found.append(ids[at : at + length])
        at += length
    return found


def train_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 4096 tokens, learnt from the text in two seconds: nothing has to be downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([library_text()], trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")
