"""An embedding kept in host memory gives the same rows, and comes back as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.families import adapt, gradients, make

from gazelle import accelerate
from gazelle.models.host_embedding import can_move_embedding, embedding_on_host

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def ids(device: str = "cpu") -> torch.Tensor:
    return torch.tensor([[1, 5, 96, 5, 0], [2, 2, 3, 4, 90]], device=device)


def step(model: Any, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids(device), labels=ids(device), use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "granite"])
def test_a_step_is_the_same(family: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = adapt(make(family, 1, tied=False, dtype=dtype)).to(device)
    accelerate(model)
    assert can_move_embedding(model)
    embedding = model.get_base_model().get_input_embeddings()
    kind, weight, parameter = type(embedding), embedding.weight.detach().clone(), embedding.weight
    loss, grads = step(model, device)
    with embedding_on_host(model):
        assert embedding.weight.shape == weight.shape
        assert embedding.weight.untyped_storage().nbytes() <= 8
        assert isinstance(embedding, kind)
        got, got_grads = step(model, device)
    assert torch.equal(got, loss)
    assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())
    assert type(embedding) is kind and embedding.weight is parameter
    assert embedding.weight.device.type == device
    assert torch.equal(embedding.weight, weight)
    assert embedding.weight.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_given_back_while_it_lasts() -> None:
    model = adapt(make("llama", 2, tied=False, vocab_size=200_000)).to("cuda")
    size = model.get_base_model().get_input_embeddings().weight.nbytes
    before = torch.cuda.memory_allocated()
    with embedding_on_host(model):
        assert torch.cuda.memory_allocated() <= before - size + 2**20
        assert model(input_ids=ids("cuda")).logits.isfinite().all()


def test_it_comes_back_after_an_error() -> None:
    model = adapt(make("llama", 3, tied=False))
    embedding = model.get_base_model().get_input_embeddings()
    kind, weight = type(embedding), embedding.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), embedding_on_host(model):
        raise ZeroDivisionError
    assert type(embedding) is kind
    assert torch.equal(embedding.weight, weight)


def test_a_checkpoint_written_meanwhile_holds_it(tmp_path: Path) -> None:
    """As for a model of which only the norms are trained."""
    model = accelerate(make("llama", 5, tied=False).requires_grad_(False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with embedding_on_host(model):
        during = model.state_dict()
        model.save_pretrained(tmp_path)
    assert all(torch.equal(during[name], tensor) for name, tensor in before.items())
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model.get_input_embeddings().weight.data.add_(1)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"] + 1)


def test_which_embeddings_stay() -> None:
    assert can_move_embedding(adapt(make("llama", 4, tied=False)))
    assert not can_move_embedding(adapt(make("llama", 4, tied=True)))
    trained = adapt(make("llama", 4, tied=False))
    trained.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    assert not can_move_embedding(trained)
    limited = adapt(make("llama", 4, tied=False))
    limited.get_base_model().get_input_embeddings().max_norm = 1.0
    assert not can_move_embedding(limited)
    assert not can_move_embedding(adapt(make("llama", 4, tied=False), ["embed_tokens", "q_proj"]))
    assert can_move_embedding(trained.requires_grad_(False))
