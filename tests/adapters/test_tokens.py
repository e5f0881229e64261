"""New tokens: trained, saved with the adapter and loaded by plain PEFT, whether added before or after the adapter."""

import peft
import pytest
import torch

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import new_token_indices, resize_token_embeddings
from gazelle.base.errors import OptionError

IDS = torch.tensor([[5, 64, 9, 65, 7]])


def train(model):
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_new_rows_are_trained_saved_and_reloaded(tied, order, tiny, tmp_path):
    model = tiny(tie_word_embeddings=tied)
    old_rows = model.get_input_embeddings().weight[:64].clone()
    if order == "before":
        resize_token_embeddings(model, 66)
        model = add_lora(model, r=4)
    else:
        model = add_lora(model, r=4)
        resize_token_embeddings(model, 66)
    assert model.get_base_model().config.vocab_size == 66
    train(model)
    model.eval()
    with torch.no_grad():
        want = model(IDS).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    plain = tiny(tie_word_embeddings=tied)
    plain.resize_token_embeddings(66, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.get_base_model().get_input_embeddings().weight[:64], old_rows)


def test_only_the_new_rows_cost_memory(tiny):
    model = tiny(tie_word_embeddings=True)
    resize_token_embeddings(model, 66)
    model = add_lora(model, r=4)
    extra = [w for n, w in model.named_parameters() if w.requires_grad and "lora_" not in n]
    assert sum(w.numel() for w in extra) == 2 * 32


def test_factors_survive_tokens_added_later(tiny):
    model = add_lora(tiny(), r=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        before = model(ids).logits
        resize_token_embeddings(model, 70)
        torch.testing.assert_close(model(ids).logits[..., :64], before)
    assert all(w.requires_grad == ("lora_" in n or "trainable_tokens" in n) for n, w in model.named_parameters())


def test_tokens_added_twice(tiny):
    model = add_lora(tiny(tie_word_embeddings=True), r=4)
    resize_token_embeddings(model, 65)
    train_ids = torch.tensor([[64, 3]])
    model(train_ids).logits.sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.1 * weight.grad
        before = model(train_ids).logits
        resize_token_embeddings(model, 67)
        torch.testing.assert_close(model(train_ids).logits[..., :65], before)
    assert model.peft_config["default"].trainable_token_indices == [64, 65, 66]


def test_padded_vocabularies_keep_their_size(tiny):
    model = tiny()
    model.tokens_in_use = 50
    embedding = resize_token_embeddings(model, 52)
    assert embedding.weight.shape[0] == 64
    torch.testing.assert_close(embedding.weight[50], embedding.weight[:50].mean(0))
    assert model.added_token_ids == [50, 51]
    assert resize_token_embeddings(model, 52) is embedding


@pytest.mark.parametrize("size", [0, -3, 10, "66"])
def test_sizes_that_cannot_be(size, tiny):
    model = tiny()
    model.tokens_in_use = 50
    with pytest.raises(OptionError, match=r"tokens cannot be taken away|positive whole number"):
        resize_token_embeddings(model, size)


def test_a_padded_vocabulary_of_a_plain_model_stays(tiny):
    model = tiny()
    embedding = model.get_input_embeddings()
    assert resize_token_embeddings(model, 50) is embedding
    assert embedding.weight.shape[0] == 64
    assert new_token_indices(model) is None


@pytest.mark.parametrize(("tied", "saved", "rows"), [
    (True, ["embed_tokens", "lm_head"], None), (True, ["embed_tokens"], None), (True, ["lm_head"], None),
    (False, ["embed_tokens", "lm_head"], None), (False, ["embed_tokens"], {"lm_head": [64, 65]}),
    (False, ["lm_head"], {"embed_tokens": [64, 65]})])
def test_ends_trained_in_full_need_no_rows(tied, saved, rows, tiny):
    model = tiny(tie_word_embeddings=tied)
    resize_token_embeddings(model, 66)
    model = add_lora(model, r=4, modules_to_save=saved)
    assert model.peft_config["default"].trainable_token_indices == rows
    before = model(IDS).logits.detach()
    train(model)
    assert not torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*(q_proj|embed_tokens)"])
def test_new_tokens_and_factors_on_one_module(targets, tiny):
    model = tiny()
    add_lora(tiny(), target_modules=targets)
    resize_token_embeddings(model, 66)
    with pytest.raises(OptionError, match="cannot have LoRA as well") as caught:
        add_lora(model, target_modules=targets)
    assert (caught.value.where, caught.value.found) == ("target_modules", "embed_tokens")
    assert caught.value.fix
