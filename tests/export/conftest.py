"""Small tokenizers of both kinds that GGUF files hold, and small random models with enough rows for them."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.models.families import LONG_ROPE, make

TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
            "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
ROWS = 384
SIZES: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3": {"num_hidden_layers": 7, "layer_types": None},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None},
    "phi4-mini": {"max_position_embeddings": 1024, "original_max_position_embeddings": 512,  # llama.cpp's least is 256
                  "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 512}},
    "qwen2": {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12},
}


@pytest.fixture(scope="session")
def model() -> Callable[..., Any]:
    """model("llama") is a random model of a case of tests/models/families.py, in float32, for answering."""
    def build(family: str, seed: int = 1, **options: Any) -> Any:
        return make(family, seed, **({"vocab_size": ROWS} | SIZES.get(family, {}) | options)).eval()

    return build


def byte_level(*, pre: Any = None, normalizer: Any = None, ignore_merges: bool = False, **options: Any) -> Any:
    """A byte-level tokenizer with a few hundred merges; `pre` are the steps that split text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=370, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    options = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sentencepiece(*, prefix: bool = True) -> Any:
    """A tokenizer as those of Llama 2 and Mistral (`prefix`), or of Gemma."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁") if ord(letter) < 0x3000})
    joined = ["▁t", "he", "▁the", "▁a", "in", "er", "on", "▁c", "at", "▁cat", "▁▁", "ing"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, *joined])}
    ranked = [(token[:i], token[i:]) for token in joined for i in range(1, len(token))
              if token[:i] in vocabulary and token[i:] in vocabulary]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=ranked, unk_token="<unk>", fuse_unk=True,
                                   byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in pieces[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


TEXTS = [
    "hello there, the cat sat on the mat; it's 1234 o'clock and we'LL see.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i)  # naïve",
    "  leading and   inner    spaces, trailing   ", "emoji 🙂👩‍👩‍👧 and 中文字符 and ελληνικά and עברית",
    "x = {'a': [1, 2, 3]};\r\n\r\n<div class=\"c\">&amp;</div>",
    "...!!! ?? #$%^&*()_+-=[]{}|", "100000000 3.14159 0x1F",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer that fits `model`."""
    return byte_level()


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """For every test here."""
