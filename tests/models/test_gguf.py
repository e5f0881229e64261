"""GGUF files: written from a Hugging Face model with gguf-py, read back by gazelle, compared with the original."""

import contextlib
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gazelle.base.errors import ModelError, OutputError
from gazelle.models import gguf as conversion
from gazelle.models.gguf import convert_gguf
from gazelle.models.gguf_file import read_gguf
from gazelle.models.gguf_tokenizer import gguf_tokenizer

# model type -> llama.cpp's name, q and k interleaved, norms stored as 1 + w
FAMILIES = {
    "llama": ("llama", True, False), "qwen2": ("qwen2", False, False), "qwen3": ("qwen3", False, False),
    "phi3": ("phi3", False, False), "gemma": ("gemma", False, True), "gemma2": ("gemma2", False, True),
    "gemma3_text": ("gemma3", False, True), "smollm3": ("smollm3", True, False), "granite": ("granite", True, False),
}
TEXT = "hello there, 1234 <|im_end|> naïve 🙂\n\n  tell"


def write(path, model, *, quantize=None, tokens=300, pre="gpt-2", scaling=None, **fields):
    """What llama.cpp's convert_hf_to_gguf.py does to these families."""
    name, permuted, plus_one = FAMILIES[model.config.model_type]
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    if name == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if scaling:
        writer.add_string(f"{name}.rope.scaling.type", scaling)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    write_vocabulary(writer, tokens, pre)
    for key, value in fields.items():
        writer.add_uint32("tokenizer.ggml." + key, value)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, weight in dict(model.named_parameters()).items():
        stem, _, suffix = key.rpartition(".")
        value = weight.detach().numpy()
        if permuted and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if plus_one and key.endswith("norm.weight"):
            value = value + 1
        target = f"{table.get_name(stem)}.{suffix}"
        if quantize is not None and value.ndim == 2:
            raw = gguf.quants.quantize(np.ascontiguousarray(value), quantize)
            writer.add_tensor(target, raw, raw_dtype=quantize)
        else:
            writer.add_tensor(target, np.ascontiguousarray(value, dtype=np.float32))
    finish(writer)
    return path


def write_vocabulary(writer, tokens, pre):
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "Ġt", "hell"]
    vocabulary += [f"unused{i}" for i in range(tokens - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["h e", "l l", "Ġ t", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)  # as in the demo model: equal to EOS
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_each_family(family, tiny, tmp_path):
    model = tiny(family)
    folder = convert_gguf(write(tmp_path / "model.gguf", model))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(again) is type(model)
    ids = torch.randint(3, 300, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_quantised_tensors_are_exactly_ggufs(tiny, tmp_path):
    path = write(tmp_path / "model.gguf", tiny("qwen2", hidden_size=64, intermediate_size=64, head_dim=16),
                 quantize=gguf.GGMLQuantizationType.Q8_0)
    folder = convert_gguf(path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.float32
    reader = gguf.GGUFReader(path)
    want = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    got = again.model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(got, gguf.quants.dequantize(want.data, want.tensor_type))


def test_large_models_are_written_in_shards(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_SHARD_BYTES", 20_000)
    model = tiny()
    folder = convert_gguf(write(tmp_path / "sharded.gguf", model))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_llama3_rope_scaling_is_recovered(tiny, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", head_dim=32, rope_parameters=rope, max_position_embeddings=131072)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    path = tmp_path / "rope.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_factors(self):
        self.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        write(path, model)
    config = AutoModelForCausalLM.from_pretrained(convert_gguf(path)).config
    assert config.rope_parameters == pytest.approx(rope) or config.rope_parameters == rope


def test_special_ids_come_from_the_file(tiny, tmp_path):
    folder = convert_gguf(write(tmp_path / "model.gguf", tiny(), eot_token_id=1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.pad_token is None  # the file's is EOS
    assert tokenizer.chat_template.startswith("{% for m in messages")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == 2
    assert model.generation_config.eos_token_id == [2, 1]
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_text_survives_each_splitting_rule(pre, tiny, tmp_path):
    tokenizer = gguf_tokenizer(read_gguf(write(tmp_path / "model.gguf", tiny(), pre=pre)))
    ids = tokenizer(TEXT)["input_ids"]
    # NFC is Qwen's own; the text is in that form already.
    assert tokenizer.decode(ids[1:] if pre == "llama-bpe" else ids) == TEXT
    assert (ids[0] == tokenizer.bos_token_id) is (pre == "llama-bpe")  # that family begins with BOS
    assert ids.count(2) == 1


def test_sentencepiece_merges_follow_the_scores(tmp_path):
    from tokenizers import SentencePieceBPETokenizer

    trained = SentencePieceBPETokenizer()
    corpus = ["the cat sat on the mat", "the hat that the cat had", "a cat, a hat and a mat"] * 3
    trained.train_from_iterator(corpus, vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    vocabulary = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    path = tmp_path / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(i) for i in range(len(vocabulary))])
    writer.add_token_types([2, 3, 3] + [1] * (len(vocabulary) - 3))
    for add, value in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(value)
    finish(writer)
    tokenizer = gguf_tokenizer(read_gguf(path))
    for text in corpus:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *trained.encode(text).tokens]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_second_load_reads_no_gguf(tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", tiny())
    folder = convert_gguf(path)
    monkeypatch.setattr(conversion, "read_gguf", None)
    assert convert_gguf(path) == folder


def test_a_conversion_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch, cache):
    path = write(tmp_path / "broken.gguf", tiny())
    monkeypatch.setattr(conversion, "_weight", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_gguf(path)
    assert not list((cache / "gguf").glob("*broken*"))


def test_full_disk(tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "big.gguf", tiny())
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="not enough disk space") as caught:
        convert_gguf(path)
    assert caught.value.found == "10 bytes free"


def damaged(data: bytes, what: str) -> bytes:
    return {
        "empty": b"", "not gguf": b"PK\x03\x04" + data[4:], "version 9": data[:4] + struct.pack("<I", 9) + data[8:],
        "tensor count": data[:8] + struct.pack("<Q", 2**60) + data[16:],
        "field count": data[:16] + struct.pack("<Q", 2**60) + data[24:],
        "string length": data[:24] + struct.pack("<Q", 2**62) + data[32:],
        "cut in the header": data[:2000], "cut in the tensors": data[:-500],
    }[what]


@pytest.mark.parametrize("what", ["empty", "not gguf", "version 9", "tensor count", "field count", "string length",
                                  "cut in the header", "cut in the tensors"])
def test_damaged_files(what, tiny, tmp_path):
    path = write(tmp_path / "model.gguf", tiny())
    path.write_bytes(damaged(path.read_bytes(), what))
    with pytest.raises(ModelError) as caught:
        convert_gguf(path)
    assert str(path) in caught.value.where
    assert caught.value.found
    assert caught.value.fix


def test_random_damage_never_crashes(tiny, tmp_path):
    """One wrong byte in the header is either harmless or a ModelError."""
    path = write(tmp_path / "model.gguf", tiny())
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for at in generator.integers(4, 3000, 300):
        earlier, data[at] = data[at], int(generator.integers(256))
        path.write_bytes(data)
        with contextlib.suppress(ModelError):
            convert_gguf(path)
        data[at] = earlier


def test_unknown_family_is_named(tmp_path):
    path = tmp_path / "mamba.gguf"
    finish(gguf.GGUFWriter(path, "mamba"))
    with pytest.raises(ModelError, match="not supported") as caught:
        convert_gguf(path)
    assert caught.value.found == "mamba"
    assert "qwen2" in caught.value.expected


def test_tensors_that_do_not_fit_the_family(tiny, tmp_path):
    path = write(tmp_path / "model.gguf", tiny("qwen3"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q_norm.weight", b"blk.1.attn_Q_norm.weight"))
    with pytest.raises(ModelError, match="not those of its family") as caught:
        convert_gguf(path)
    assert "blk.1.attn_q_norm.weight" in caught.value.found


def test_demo_model_equals_the_file(demo_gguf):
    folder = convert_gguf(demo_gguf)
    from safetensors import safe_open

    from gazelle.models.gguf_families import unpermute

    file = read_gguf(demo_gguf)
    entry = file.tensors["blk.7.ffn_down.weight"]
    raw = np.memmap(demo_gguf, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.size,))
    exact = gguf.quants.dequantize(raw.reshape(entry.shape[0], -1), gguf.GGMLQuantizationType.Q4_1)
    with safe_open(folder / "model.safetensors", "np") as got:
        np.testing.assert_array_equal(got.get_tensor("model.layers.7.mlp.down_proj.weight"), exact)
        np.testing.assert_array_equal(got.get_tensor("model.embed_tokens.weight"), file.read("token_embd.weight"))
        np.testing.assert_array_equal(got.get_tensor("model.layers.3.self_attn.k_proj.weight"),
                                      unpermute(file.read("blk.3.attn_k.weight"), 3))


def test_one_part_of_several_is_named_first(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "other-family")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(ModelError, match="one part of several") as caught:
        convert_gguf(tmp_path / "m-00002-of-00003.gguf")
    assert caught.value.found == "split.count 3"
    assert "--merge" in caught.value.fix


@pytest.mark.parametrize(("family", "scaling"), [("qwen2", "dynamic"), ("gemma3_text", "yarn"), ("llama", "longrope")])
def test_unknown_rope_scaling_is_refused(family, scaling, tiny, tmp_path):
    with pytest.raises(ModelError, match="in an unknown way") as caught:
        convert_gguf(write(tmp_path / "model.gguf", tiny(family), scaling=scaling))
    assert scaling in caught.value.found
