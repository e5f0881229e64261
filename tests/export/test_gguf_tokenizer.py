"""Tokenizers in GGUF files: the real llama.cpp splits text into the same ids as transformers."""

import random

import pytest
from tests.export.conftest import TEXTS, byte_level, sentencepiece
from tests.llama import Llama
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from gazelle.base.errors import ModelError
from gazelle.export.gguf import export_gguf
from gazelle.models.gguf import convert_gguf
from gazelle.models.gguf_file import read_gguf
from gazelle.models.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT

CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
         r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CODE = ["if (x != NULL) {\n\t\treturn &x->y[i];\n}", "SELECT * FROM t WHERE a='it''s';", "#!/bin/sh\nls -la | wc -l",
        "λ x . x", "<|im_start|>user\nHi<|im_end|>\n", "a<tool>b", "I'm we'LL they'Ve", "北京 2024年5月1日", "e=mc²"]


def mixed_texts(count):
    """Pieces of code, emoji, Chinese and other scripts, numbers and runs of white space, put together at random."""
    draw = random.Random(0)
    pieces = [*TEXTS, *CODE, " ", "  ", "\n", "\n\n", "\t", "    ", "\r\n", "🙂", "🇩🇪", "ﬁ", "123", "'s", "中文", "Ω"]
    return [*TEXTS, *CODE, *("".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(count))][:count]


def steps(rule, *, invert=False):
    split = pre_tokenizers.Split(Regex(rule), behavior="removed" if invert else "isolated", invert=invert)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre=pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "llama-bpe": lambda: byte_level(pre=steps(LLAMA3_SPLIT), ignore_merges=True),
    "smaug-bpe": lambda: byte_level(pre=steps(LLAMA3_SPLIT, invert=True)),
    "qwen2": lambda: byte_level(pre=steps(QWEN2_SPLIT), normalizer=normalizers.NFC()),
    "tekken": lambda: byte_level(pre=steps(CASED)),
    "llama": sentencepiece,
    "gemma": lambda: sentencepiece(prefix=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_transformers(name, model, tmp_path):
    tokenizer = TOKENIZERS[name]()
    path, = export_gguf(model("llama"), tokenizer, tmp_path, "f16")
    if name not in ("llama", "gemma"):
        assert read_gguf(path).metadata["tokenizer.ggml.pre"] == name
    with Llama(path) as llama:
        for text in mixed_texts(100):
            want = tokenizer(text)["input_ids"]
            assert llama.tokenize(text, special=True) == want, text


def test_ids_of_the_demo_tokenizer(demo_tokenizer, model, tmp_path):
    tokenizer = demo_tokenizer
    tiny = model("llama", vocab_size=len(tokenizer))
    path, = export_gguf(tiny, tokenizer, tmp_path, "f16")
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == "smollm"
    texts = mixed_texts(200)
    with Llama(path) as llama:
        assert [llama.tokenize(text, special=True) for text in texts] == [tokenizer(text)["input_ids"]
                                                                          for text in texts]
        assert llama.chat_template() == tokenizer.chat_template
        assert {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|endoftext|>"])} <= llama.ends()


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "llama", "gemma"])
def test_gazelle_reads_the_same_tokenizer_back(name, model, tmp_path):
    tokenizer = TOKENIZERS[name]()
    again = AutoTokenizer.from_pretrained(convert_gguf(export_gguf(model("llama"), tokenizer, tmp_path, "f16")[0]))
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_every_end_of_an_answer_is_written(model, tokenizer, tmp_path):
    tiny = model("llama")
    tiny.generation_config.eos_token_id = [2, 0, 30]
    path, = export_gguf(tiny, tokenizer, tmp_path, "f16")
    with Llama(path) as llama:
        assert {0, 2, 30} <= llama.ends()


@pytest.mark.parametrize("bos", [True, False])
def test_bos_goes_before_a_text_as_in_training(bos, model, tmp_path):
    from tokenizers import processors

    tokenizer = byte_level()
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    path, = export_gguf(model("llama"), tokenizer, tmp_path, "f16")
    with Llama(path) as llama:
        assert llama.tokenize("hello", special=True) == tokenizer("hello")["input_ids"]
        assert (llama.tokenize("hello", special=True)[0] == 1) is bos


@pytest.mark.parametrize("folder", ["mine", "my-phi-3"])
@pytest.mark.parametrize("strips", [True, False])
def test_special_tokens_of_phi3_swallow_spaces(strips, folder, model, tmp_path):
    from tokenizers import AddedToken

    tokenizer = sentencepiece()
    tokenizer.add_special_tokens({"additional_special_tokens": [
        AddedToken(token, rstrip=strips, normalized=False, special=True) for token in ("<|user|>", "<|endoftext|>")]})
    path, = export_gguf(model("phi3"), tokenizer, tmp_path / folder, "f16")
    text = "<|user|>  \n the cat"
    with Llama(path) as llama:
        assert llama.tokenize(text, special=True) == tokenizer(text)["input_ids"]


def test_rows_without_a_token_are_filled(model, tokenizer, tmp_path):
    path, = export_gguf(model("llama", vocab_size=400), tokenizer, tmp_path, "f16")
    metadata = read_gguf(path).metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 400
    assert metadata["tokenizer.ggml.tokens"][399] == "[PAD399]"
    assert metadata["tokenizer.ggml.token_type"][399] == 5
    Llama(path).__exit__(None, None, None)


def whole_words():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))


@pytest.mark.parametrize(("make", "message", "found"), [
    (lambda: byte_level(pre=steps(r"\p{L}+|\s")), "splits text", r"\p{L}+|\s"),
    (lambda: byte_level(normalizer=normalizers.Lowercase()), "does not change text", "Lowercase"),
    (whole_words, "this kind of tokenizer", "WordLevel"),
])
def test_what_llama_cpp_cannot_name_is_refused(make, message, found, model, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        export_gguf(model("llama"), make(), tmp_path / "out", "f16")
    assert found in caught.value.found.replace("\\\\", "\\")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_rows(model, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="more tokens than the model") as caught:
        export_gguf(model("llama", vocab_size=300), tokenizer, tmp_path / "out", "f16")
    assert "resize_token_embeddings" in caught.value.fix
