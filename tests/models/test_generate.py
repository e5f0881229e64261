"""Batched answers equal single ones, pieces add up to the whole, and the model comes back as it was."""

from pathlib import Path

import pytest
import torch

from gazelle.base.errors import OptionError
from gazelle.models.generate import generate_texts, stream_text
from gazelle.models.load import load_model
from gazelle.models.special_tokens import stop_at_end_of_turn

QUESTIONS = [[{"role": "user", "content": text}] for text in ("hi", "tell me all that there is", "hello hell", "a b")]


@pytest.fixture
def loaded(checkpoint):
    return load_model(str(checkpoint), load_in_4bit=False)


def test_batches_equal_single_answers(loaded):
    model, tokenizer = loaded
    alone = [generate_texts(model, tokenizer, [question], max_new_tokens=8)[0] for question in QUESTIONS]
    assert generate_texts(model, tokenizer, QUESTIONS, max_new_tokens=8, batch_size=3) == alone
    assert ["".join(stream_text(model, tokenizer, question, max_new_tokens=8)) for question in QUESTIONS] == alone


def test_model_comes_back_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    model.model.norm.eval()
    settings = model.generation_config
    generate_texts(model, tokenizer, ["hello", QUESTIONS[0]], max_new_tokens=2, temperature=0.7)
    pieces = stream_text(model, tokenizer, QUESTIONS[0], max_new_tokens=3, temperature=0.7, top_p=0.9)
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert model.training
    assert not model.model.norm.training
    assert model.generation_config is settings
    assert tokenizer.padding_side == "right"


def test_stops_at_every_end_token(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    first = int(model(**prompt).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [2, first]
    assert generate_texts(model, tokenizer, [QUESTIONS[0]], max_new_tokens=5) == [""]
    assert list(stream_text(model, tokenizer, QUESTIONS[0], max_new_tokens=5)) == []


def test_a_character_of_several_tokens_comes_whole(loaded, monkeypatch):
    model, tokenizer = loaded
    answer = iter(tokenizer("é🙂")["input_ids"])
    monkeypatch.setattr("gazelle.models.generate._choose", lambda *_: next(answer, tokenizer.eos_token_id))
    assert list(stream_text(model, tokenizer, "x", max_new_tokens=20)) == ["é", "🙂"]


def test_top_p_keeps_the_likeliest(monkeypatch):
    from gazelle.models.generate import _choose

    torch.manual_seed(0)
    logits = torch.tensor([5.0, 4.9, -1.0, -2.0])
    assert {_choose(logits, 1.0, 0.6) for _ in range(50)} == {0, 1}
    assert {_choose(logits, 1.0, 0.1) for _ in range(20)} == {0}


@pytest.mark.parametrize(("options", "where"), [({"max_new_tokens": 0}, "max_new_tokens"),
                                                ({"max_new_tokens": 1, "temperature": -1.0}, "temperature")])
def test_numbers_out_of_range(options, where, loaded):
    with pytest.raises(OptionError) as caught:
        generate_texts(*loaded, ["x"], **options)
    assert caught.value.where == where


def test_messages_need_a_template(loaded):
    model, tokenizer = loaded
    tokenizer.chat_template = None
    with pytest.raises(OptionError, match="no chat template"):
        generate_texts(model, tokenizer, QUESTIONS, max_new_tokens=1)


def test_a_tokenizer_without_padding(loaded):
    model, tokenizer = loaded
    want = generate_texts(model, tokenizer, QUESTIONS, max_new_tokens=4)
    tokenizer.pad_token = model.generation_config.pad_token_id = model.config.pad_token_id = None
    assert generate_texts(model, tokenizer, QUESTIONS, max_new_tokens=4) == want


def test_a_rendered_prompt_begins_once(loaded):
    from tokenizers.processors import TemplateProcessing

    from gazelle.models.generate import encode_prompt

    tokenizer = loaded[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)])
    plain = encode_prompt(tokenizer, "hello")
    assert plain[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, tokenizer.bos_token + "hello") == plain


def test_stops_are_added_where_the_template_ends_a_turn(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    before = model.generation_config.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no such conversation') }}{% endfor %}"
    stop_at_end_of_turn(model, tokenizer)
    assert model.generation_config.eos_token_id == before
    spare = tokenizer.pad_token
    turn = "{{ m['role'] + ': ' + m['content'] + '" + spare + "' }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    stop_at_end_of_turn(model, tokenizer)
    stops = model.generation_config.eos_token_id
    assert tokenizer.pad_token_id in stops
    assert tokenizer.eos_token_id in stops
