"""Small random models, a tokenizer of letters, and transformers' own answers to compare with."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch


class Letters:
    """Every id is a letter; there is no end token."""

    eos_token_id = bos_token_id = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture(scope="session")
def alone() -> Callable[..., list[int]]:
    """alone(model, prompt, n) is transformers' greedy answer of exactly n tokens, computed for that prompt alone."""

    def answer(model: Any, prompt: list[int], n: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                             do_sample=False, pad_token_id=0)
        return out[0, len(prompt):].tolist()

    return answer


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """prompts(5, 17) are random ids of these lengths."""

    def make(*lengths: int, seed: int = 1) -> list[list[int]]:
        draws = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 97, (length,), generator=draws).tolist() for length in lengths]

    return make


def drive(batcher: Any) -> list[Any]:
    """All events until nothing is left to do."""
    events = []
    while batcher.busy:
        events += batcher.step()
    return events
