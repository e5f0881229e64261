"""load_model on the demo model and on tiny ones: dtypes, quantisation, context, special tokens, adapters."""

import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.base.errors import OptionError
from gazelle.models.checkpoint import _NOT_WANTED, _WANTED, check_finite, find_checkpoint
from gazelle.models.context import fit_context
from gazelle.models.load import load_model
from gazelle.models.save import save_merged


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_demo_model_answers_and_stops(demo_gguf):
    model, tokenizer = load_model(str(demo_gguf), load_in_4bit=False)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("<|endoftext|>", 0)
    assert model.generation_config.eos_token_id == 2
    assert (len(tokenizer), model.max_seq_length, tokenizer.padding_side) == (49152, 2048, "right")
    assert (model.dtype, model.name_or_path) == (torch.float32, str(demo_gguf))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    # digits are split one by one, as in its training
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024")["input_ids"]) == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(("dtype", "expected"), [
    (None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("fp32", torch.float32),
    ("auto", torch.float32), ("torch.bfloat16", torch.bfloat16)])
def test_dtypes(dtype, expected, checkpoint):
    assert load_model(str(checkpoint), dtype=dtype, load_in_4bit=False)[0].dtype == expected


@pytest.mark.parametrize(("options", "bits"), [
    ({}, 4), ({"quant_method": "fp4"}, 4), ({"load_in_8bit": True}, 8), ({"full_finetuning": True}, 0),
    ({"load_in_4bit": False}, 0), ({"load_in_4bit": False, "load_in_8bit": True}, 8)])
def test_quantisation(options, bits, checkpoint):
    model, _ = load_model(str(checkpoint), **options)
    linear = model.model.layers[0].mlp.up_proj
    assert {"Linear": 0, "Linear4bit": 4, "Linear8bitLt": 8}[type(linear).__name__] == bits
    if bits == 4:
        state = linear.weight.quant_state
        assert state.quant_type == options.get("quant_method", "nf4")
        assert (state.nested, state.dtype) == (True, torch.float32)
    assert type(model.lm_head).__name__ == "Linear"
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantised_models_train(options, checkpoint):
    model, _ = load_model(str(checkpoint), **options)
    model = add_lora(model, use_gradient_checkpointing=True).train()
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.requires_grad)


def test_a_4bit_checkpoint_is_used_as_it_is(checkpoint, tmp_path, caplog):
    model, tokenizer = load_model(str(checkpoint))
    model.save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    with caplog.at_level(logging.INFO, "gazelle"):
        again, _ = load_model(str(tmp_path / "four"))
    assert "quantised already" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(OptionError, match="cannot be trained"):
        load_model(str(tmp_path / "four"), full_finetuning=True)


def test_longer_sequences_scale_the_rotary_embedding(checkpoint, caplog):
    with caplog.at_level(logging.INFO, "gazelle"):
        model, tokenizer = load_model(str(checkpoint), max_seq_length=192, load_in_4bit=False)
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 1.5
    assert (model.max_seq_length, tokenizer.model_max_length, model.config.max_position_embeddings) == (192, 192, 192)
    assert "from 128 to 192 tokens" in caplog.text


@pytest.mark.parametrize(("rope", "length", "fits"), [
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16}, 129, False),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, True),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 513, False)])
def test_models_that_are_stretched_already(rope, length, fits, tiny):
    config = tiny(rope_parameters=rope | {"rope_theta": 10000.0}).config
    if fits:
        assert fit_context(config, length) == length
        return
    with pytest.raises(OptionError, match="cannot be stretched") as caught:
        fit_context(config, length)
    assert rope["rope_type"] in caught.value.found


def test_length_left_out_is_the_models_own(checkpoint):
    assert load_model(str(checkpoint), load_in_4bit=False)[0].max_seq_length == 128


@pytest.mark.parametrize(("special", "options", "expected"), [
    ((), {"pad_token": "<|im_end|>"}, "<|endoftext|>"), ((), {"pad_token": None}, "<|endoftext|>"),
    (("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"), {"pad_token": None}, "<pad>"),
    (("<|im_start|>", "<|im_end|>", "<|reserved_special_token_0|>"), {"pad_token": None},
     "<|reserved_special_token_0|>"),
    (("<|im_start|>", "<|im_end|>"), {"pad_token": None}, "<|pad|>")])
def test_pad_is_not_eos(special, options, expected, checkpoint, tiny_tokenizer):
    tokenizer = tiny_tokenizer(special or ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **options)
    tokenizer.save_pretrained(checkpoint)
    model, loaded = load_model(str(checkpoint), load_in_4bit=False)
    assert loaded.pad_token == expected
    assert loaded.pad_token_id != loaded.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == loaded.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == 320  # a spare row, never a new one
    assert len(loaded) == len(tokenizer) + (expected == "<|pad|>")


def test_the_vocabulary_grows_only_without_a_spare_row(tiny, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), pad_token=None)
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(str(tmp_path), load_in_4bit=False)
    assert model.get_input_embeddings().weight.shape[0] == len(loaded) == len(tokenizer) + 1
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_stop_tokens_are_kept(checkpoint):
    edit(checkpoint / "generation_config.json", eos_token_id=[7, 9])
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]


def test_adapter_folder_loads_its_base(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    tokenizer.add_tokens(["<new>"])
    resize_token_embeddings(model, len(tokenizer) + 40)  # past the embedding's spare rows
    tokenizer.add_tokens([f"<new{i}>" for i in range(40)])
    model = add_lora(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    ids = tokenizer("hello <new> <new7>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = model.eval()(ids).logits
    save_merged(model, tokenizer, tmp_path / "adapter", save_method="lora")
    again, loaded = load_model(str(tmp_path / "adapter"), load_in_4bit=False)
    assert isinstance(again, PeftModel)
    assert len(loaded) == len(tokenizer)
    assert again.max_seq_length == 128
    assert {n for n, w in again.named_parameters() if w.requires_grad} \
        == {n for n, w in model.named_parameters() if w.requires_grad}
    assert torch.equal(loaded("hello <new> <new7>", return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, want)
    frozen, _ = load_model(str(tmp_path / "adapter"), load_in_4bit=False, is_trainable=False)
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_limits_of_a_composite_model_are_those_of_its_text(tiny):
    from transformers import LlavaConfig

    config = LlavaConfig(text_config=tiny().config.to_dict())
    assert fit_context(config, None) == 128
    assert fit_context(config, 256) == 256
    assert config.text_config.rope_parameters["factor"] == 2
    assert config.text_config.max_position_embeddings == 256


def test_weights_that_are_elsewhere_are_not_looked_at():
    check_finite([("kept on disk", torch.empty(3, device="meta"))], "a model")


def test_an_adapter_beside_its_bases_config_is_an_adapter(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    save_merged(add_lora(model), tokenizer, tmp_path / "adapter", save_method="lora")
    shutil.copy(checkpoint / "config.json", tmp_path / "adapter")
    assert isinstance(load_model(str(tmp_path / "adapter"))[0], PeftModel)
    assert find_checkpoint(str(tmp_path / "adapter"), weights=False).adapter
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "adapter")
    assert find_checkpoint(str(tmp_path / "adapter")).adapter is None


def test_an_index_left_from_earlier_is_not_read(checkpoint):
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(str(checkpoint), load_in_4bit=False)


def test_what_is_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model.safetensors", "config.json", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken",
              "vocab.bpe", "source.spm", "tokenizer.model", "gazelle.json"]
    others = ["checkpoint-500/model.safetensors", "checkpoint-500/config.json", "fp16/model.safetensors",
              "original/params.json", "consolidated.safetensors", "pytorch_model.bin"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED)) == wanted
