"""`model.fast_generate` takes what vLLM and Unsloth take, and gives what they give."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle import FastLanguageModel
from gazelle.base.errors import OptionError
from gazelle.models.generate import generate_texts

CHAT = [{"role": "user", "content": "hello hell"}]


@pytest.fixture
def loaded(checkpoint):
    return FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False)


@pytest.fixture
def checkpoint(demo_tokenizer, tmp_path):
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        initializer_range=0.3, eos_token_id=demo_tokenizer.eos_token_id, pad_token_id=demo_tokenizer.pad_token_id,
    )).save_pretrained(tmp_path / "base")
    demo_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_every_kind_of_prompt_in_order(loaded):
    model, tokenizer = loaded
    ids = tokenizer("tell me")["input_ids"]
    got = model.fast_generate(["hi", CHAT, ids, {"prompt": "hi"}, {"prompt_token_ids": ids}], max_new_tokens=6)
    want = generate_texts(model, tokenizer, ["hi", CHAT, "tell me", "hi", "tell me"], max_new_tokens=6)
    assert [answer.outputs[0].text for answer in got] == want == [str(answer) for answer in got]
    assert got[2].prompt_token_ids == ids and got[0].prompt == "hi"
    assert all(1 <= len(answer.outputs[0].token_ids) <= 6 for answer in got)
    for single in ("hi", CHAT, ids):
        assert len(model.fast_generate(single, max_new_tokens=2)) == 1


def test_sampling_params_of_vllm(loaded):
    model, _ = loaded
    params = SimpleNamespace(max_tokens=5, temperature=0.9, top_p=0.9, seed=1, n=3, stop=None, logprobs=2)
    first, = model.fast_generate(["hi"], sampling_params=params)
    again, = model.fast_generate(["hi"], sampling_params=params)
    assert [answer.token_ids for answer in first.outputs] == [answer.token_ids for answer in again.outputs]
    assert len({tuple(answer.token_ids) for answer in first.outputs}) > 1
    answer = first.outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids) and answer.cumulative_logprob < 0


def test_streaming_adds_up_and_leaves_the_model_as_it_was(loaded):
    model, _ = loaded
    prompts = ["hi", "tell me all", CHAT]
    want = [answer.text for answer in model.fast_generate(prompts, max_new_tokens=7)]
    model.train()
    texts = ["", "", ""]
    for piece in model.fast_generate(prompts, max_new_tokens=7, stream=True):
        texts[piece.index] += piece.text
    assert texts == want and model.training
    pieces = model.fast_generate(prompts, max_new_tokens=7, stream=True)
    next(pieces)
    pieces.close()
    assert model.training


def test_adapters_by_request_merged_and_not(loaded, tmp_path):
    model, tokenizer = loaded
    base = generate_texts(model, tokenizer, ["hi"], max_new_tokens=8)[0]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    model = FastLanguageModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False)[0]
    lora = model.load_lora(tmp_path / "adapter")
    got = model.fast_generate(["hi"] * 3, lora_request=[lora, None, str(tmp_path / "adapter")], max_new_tokens=8)
    want = generate_texts(adapted, tokenizer, ["hi"], max_new_tokens=8)[0]
    assert [answer.text for answer in got] == [want, base, want] and want != base
    tuned, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), load_in_4bit=False)
    got = tuned.fast_generate(["hi"] * 3, lora_request=[None, "__base__", "default"], max_new_tokens=8)
    assert [answer.text for answer in got] == [want, base, want]
    tuned.merge_adapter()
    assert tuned.fast_generate("hi", max_new_tokens=8)[0].text == want


def test_mistakes_come_before_any_work(loaded):
    model, _ = loaded
    model.train()
    for options in ({"max_new_token": 3}, {"lora_request": "nobody"}, {"n": 0}, {"max_new_tokens": 1000},
                    {"sampling_params": [None]}, {"stream": True, "n": 2}):
        with pytest.raises(OptionError):
            model.fast_generate(["hi", "you"], **options)
    assert model.training and not any("forward" in module.__dict__ for module in model.modules())
    assert model.fast_generate([]) == []


def test_for_inference_and_for_training(loaded):
    """As in Unsloth: answering afterwards uses the cache, training checkpoints as before."""
    model, _ = loaded
    model.gradient_checkpointing_enable()
    model.train()
    FastLanguageModel.for_inference(model)
    assert not model.training and model.config.use_cache and not model.is_gradient_checkpointing
    want = model.fast_generate("hi", max_new_tokens=5)[0].text
    FastLanguageModel.for_training(model)
    assert model.training and model.is_gradient_checkpointing
    assert model.fast_generate("hi", max_new_tokens=5)[0].text == want


def test_a_stream_that_nobody_reads_leaves_the_model_as_it_was(loaded):
    model, _ = loaded
    model.train()
    pieces = model.fast_generate(["hi"], max_new_tokens=5, stream=True)
    with pytest.raises(OptionError, match="answering elsewhere"):  # whichever ended first would put back too much
        model.fast_generate(["hi"], max_new_tokens=5)
    del pieces
    assert model.training
    assert model.fast_generate("hi", max_new_tokens=5)[0].outputs[0].token_ids


@pytest.mark.parametrize("prompts", [[None], ["hi", 5], torch.tensor([1, 2]), [["a", "b"]], [[1.5, 2]]])
def test_what_is_no_prompt(loaded, prompts):
    with pytest.raises(OptionError, match="prompt"):
        loaded[0].fast_generate(prompts, max_new_tokens=5)


def test_ids_may_come_as_tensors(loaded):
    model, _ = loaded
    want = model.fast_generate([[5, 6, 7]], max_new_tokens=3)
    assert model.fast_generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3) == want
    assert model.fast_generate([torch.tensor([5, 6, 7]).numpy()], max_new_tokens=3) == want
