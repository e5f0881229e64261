"""Exports without a tokenizer at hand have that of training, not that of the base."""

import pytest

from gazelle import FastLanguageModel
from gazelle.base.errors import OptionError
from gazelle.facade.saving import loaded_tokenizer
from gazelle.models.gguf_file import read_gguf

OWN = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def test_the_template_is_that_of_training(tiny_checkpoint, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_checkpoint), max_seq_length=64, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert tokenizer.chat_template != OWN
    tokenizer.chat_template = OWN  # as training does where there is none, or chat_template= says so
    assert loaded_tokenizer(model).chat_template == OWN
    model.save_pretrained(str(tmp_path / "lora"))
    tokenizer.save_pretrained(str(tmp_path / "lora"))
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"))
    file, = again.save_pretrained_gguf(str(tmp_path / "gguf"), quantization_method="f16")
    assert read_gguf(file).get("tokenizer.chat_template", str) == OWN


def test_other_tokens_than_the_models_are_refused(tiny_checkpoint):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_checkpoint), max_seq_length=64, load_in_4bit=False)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(OptionError, match="tokens were added"):
        loaded_tokenizer(model)
    model.resize_token_embeddings(len(tokenizer))
    assert loaded_tokenizer(model) is tokenizer
