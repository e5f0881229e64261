"""Packed rows give what each row gives alone: logits and gradients, for families with unlike attention."""

import pytest
import torch

from gazelle.base.errors import OptionError
from gazelle.models.packed import packed_attention_on, supports_packing

LENGTHS = [7, 1, 12, 4]


def batch(lengths=LENGTHS):
    torch.manual_seed(1)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {"input_ids": torch.randint(3, 300, (1, sum(lengths))),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def step(model, logits, direction):
    model.zero_grad()
    logits.backward(direction)
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "granite",
                                    "smollm3"])
def test_packed_equals_row_by_row(family, tiny):
    model = tiny(family, initializer_range=0.1).double()
    packed = batch()
    rows = packed["input_ids"][0].split(LENGTHS)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # PyTorch's own attention cannot cap scores
    alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    direction = torch.randn_like(alone)
    alone_gradient = step(model, alone, direction)
    before = model.config._attn_implementation
    with packed_attention_on(model):
        together = model(**packed).logits[0]
        gradient = step(model, together, direction)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    assert (gradient - alone_gradient).norm() < 1e-6 * alone_gradient.norm()


def test_works_under_an_adapter_and_restores_it(tiny):
    from gazelle.adapters.lora import add_lora

    model = add_lora(tiny())
    before = model.config._attn_implementation
    with packed_attention_on(model):
        assert model(**batch()).logits.shape == (1, 24, 320)
        with pytest.raises(RuntimeError, match="leave attention_mask out"):
            model(**batch(), attention_mask=torch.ones(1, 24))
    assert model.config._attn_implementation == before
    assert model(input_ids=batch()["input_ids"], attention_mask=torch.ones(1, 24)).logits.isfinite().all()


def test_restores_after_an_error(tiny):
    model = tiny()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed_attention_on(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_calls_that_are_not_packed_run_as_before(family, tiny):
    model = tiny(family, initializer_range=0.1)
    ids, packed = batch([9, 9])["input_ids"].view(2, 9), batch()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def answer():
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    want, want_logits = answer(), model(input_ids=ids, attention_mask=mask).logits
    with packed_attention_on(model):
        together = model(**packed).logits
        assert torch.equal(answer(), want)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, want_logits)
        assert torch.equal(model(**packed).logits, together)
        with pytest.raises(AttributeError):
            model(input_ids=ids, past_key_values=3)
        assert torch.equal(model(**packed).logits, together)


def test_checkpointed_layers_run_packed_again_in_the_backward_pass(tiny):
    model = tiny().train()
    packed = batch()
    with packed_attention_on(model):
        want = step(model, model(**packed).logits, torch.ones(1, 24, 320))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        got = step(model, model(**packed, use_cache=False).logits, torch.ones(1, 24, 320))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("family", "options", "reason"), [
    ("phimoe", {"sliding_window": 5, "num_local_experts": 4}, "not told of its sliding window"),
    ("phimoe", {"num_local_experts": 4}, None),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_experts": 4},
     "not told of its sliding window"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, None),
    ("nemotron", {}, "where rows begin"), ("doge", {}, "mask of its own")])
def test_what_the_config_does_not_tell_is_tried(family, options, reason, tiny):
    model = tiny(family, **options).train()
    model.get_input_embeddings().eval()
    before, state = model.config._attn_implementation, torch.random.get_rng_state()
    said = supports_packing(model)
    assert said == reason or reason in said
    assert model.config._attn_implementation == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.get_input_embeddings().training


def test_several_sequences_are_refused(tiny):
    model = tiny()
    packed = batch()
    with pytest.raises(RuntimeError, match="not as 2 sequences"), packed_attention_on(model):
        model(input_ids=packed["input_ids"].repeat(2, 1), cu_seq_lens_q=packed["cu_seq_lens_q"], max_length_q=12)


def test_models_that_cannot(tiny):
    from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

    assert supports_packing(tiny()) is None
    mamba = AutoConfig.for_model("mamba2", hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1,
                                 num_hidden_layers=1, vocab_size=64)
    assert "state-space" in supports_packing(AutoModelForCausalLM.from_config(mamba))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert "not a causal decoder" in supports_packing(t5)
    oss = AutoConfig.for_model("gpt_oss", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                               num_key_value_heads=2, intermediate_size=16, num_local_experts=2, vocab_size=64)
    oss_model = AutoModelForCausalLM.from_config(oss)
    assert "sinks" in supports_packing(oss_model)
    with pytest.raises(OptionError, match="cannot be packed"), packed_attention_on(oss_model):
        pass
