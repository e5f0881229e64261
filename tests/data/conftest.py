"""Tokenizers: the demo model's own, and small ones with the special tokens of each template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gazelle.data.encode import Encoded, encode
from gazelle.data.load import load_conversations
from gazelle.data.templates import TEMPLATES, get_template

# Template -> BOS and EOS, as the models that use it have them.
ENDS = {"chatml": ("<s>", "<|im_end|>"), "llama-3": ("<|begin_of_text|>", "<|eot_id|>"), "phi-3": ("<s>", "<|end|>"),
        "phi-4": ("<s>", "<|im_end|>"), "gemma": ("<bos>", "<end_of_turn>"), "mistral": ("<s>", "</s>"),
        "qwen": (None, "<|im_end|>")}
LINES = ["the quick brown fox jumps over the lazy dog", "What is the capital of France? Paris is.", "user\nassistant\n"]


def small_tokenizer(template: str | None, tokens: tuple[str, ...], bos: str | None = None, eos: str | None = None,
                    **added: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `tokens`, `bos` and `eos` as special tokens; `added` are AddedToken's options."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet,
                                                              show_progress=False))
    special = [token for token in dict.fromkeys((bos, eos, *tokens)) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **added) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def load_data(source: Any, tokenizer: Any, *, max_length: int, train_on: str = "responses", **options: Any) -> Encoded:
    """The whole way of a data set: read, brought to conversations, encoded."""
    loaded = load_conversations(source, **options)
    return encode(loaded.conversations, tokenizer, max_length=max_length, train_on=train_on, source=loaded.source,
                  format=loaded.format, unused=loaded.unused)


@pytest.fixture(scope="session")
def smollm(demo_gguf: Path) -> Any:
    """The demo model's tokenizer with its own ChatML template, which adds a system turn where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    tokenizer.eos_token = "<|im_end|>"  # the GGUF file names <|im_start|>
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return small_tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """A small tokenizer for each of our templates, by its name."""
    return {name: small_tokenizer(get_template(name), TEMPLATES[name], *ENDS[name]) for name in TEMPLATES}


@pytest.fixture(scope="session")
def chatml(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["chatml"]
