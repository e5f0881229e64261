"""A layer's passes in unusual orders and with dropout. tests/models/test_families.py has the ordinary ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models.families import adapt, gradients, make, packed, rows, twin
from torch import Tensor

from gazelle import accelerate
from gazelle.engine.keep import AWAY, CHOICES, KEEP, OUTPUT, OUTPUT_AWAY, Keep
from gazelle.models.packed import packed_attention_on
from gazelle.models.swap import swapped_layers
from gazelle.train.loss import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = [*CHOICES.values(), Keep(mlp=False, chunk=5), Keep(attention=False), AWAY, replace(AWAY, mlp=False),
         OUTPUT, replace(OUTPUT, mlp=False), OUTPUT_AWAY, replace(OUTPUT_AWAY, mlp=False)]


def ids(seed: int, length: int = 9) -> Tensor:
    return rows(seed, (length,))[0][None]


def swapped(model: Any, keep: Keep = KEEP) -> Any:
    for layer in swapped_layers(accelerate(model)):
        layer.gazelle.keep = keep
    return model


def loss_of(model: Any, seed: int, length: int = 9) -> Tensor:
    return model(input_ids=ids(seed, length), labels=ids(seed, length), use_cache=False).loss


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 2e-5 * grad.norm(), name


@pytest.mark.parametrize("keep", EVERY)
def test_a_second_backward_pass_says_what_is_wrong(keep: Keep) -> None:
    model = swapped(adapt(make("llama", 1)), keep)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass .* run the forward pass again"):
        loss.backward()
    gradients(model)
    loss_of(model, 0).backward()
    assert gradients(model)


@pytest.mark.parametrize("keep", EVERY)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_several_forward_passes_before_a_backward_pass(family: str, keep: Keep) -> None:
    """As preference tuning does it: of other lengths, one of them without gradients, in one sum or one by one."""
    model = adapt(make(family, 2))
    other = twin(model)
    swapped(model, keep)

    def together(each: Any) -> None:
        first, second = loss_of(each, 0, 9), loss_of(each, 1, 6)
        with torch.no_grad():
            third = loss_of(each, 2, 7)
        (first - 0.5 * second + third).backward()

    def first_in_first_out(each: Any) -> None:
        first, second = loss_of(each, 0, 9), loss_of(each, 1, 9)
        first.backward()
        second.backward()

    def last_in_first_out(each: Any) -> None:
        first, second = loss_of(each, 0, 9), loss_of(each, 1, 9)
        second.backward()
        first.backward()

    def never_backward(each: Any) -> None:
        loss_of(each, 0, 9)
        loss_of(each, 1, 9).backward()

    for run in (together, first_in_first_out, last_in_first_out, never_backward):
        run(model)
        run(other)
        assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("keep", EVERY)
def test_losses_on_the_stream_between_layers(keep: Keep, adapted: bool) -> None:
    """Its gradient comes from the layer above and from the loss, and the layer above writes to a shared buffer."""
    model = make("qwen3", 3, num_hidden_layers=3)
    model = adapt(model) if adapted else model
    other = twin(model)
    swapped(model, keep)
    for each in (model, other):
        output = each(input_ids=ids(0), labels=ids(0), use_cache=False, output_hidden_states=True)
        (output.loss + sum(state.square().mean() for state in output.hidden_states)).backward()
    assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize("keep", EVERY)
def test_gradients_of_embeddings(keep: Keep) -> None:
    """With nothing trained: a soft prompt, say."""
    model = make("phi3", 4).requires_grad_(False)
    other = twin(model)
    swapped(model, keep)
    found = []
    for each in (model, other):
        inputs = each.get_input_embeddings()(ids(0)).detach().requires_grad_()
        each(inputs_embeds=inputs, labels=ids(0), use_cache=False).loss.backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert not gradients(model)


def test_checkpointing_of_ones_own() -> None:
    from torch.utils.checkpoint import checkpoint

    model = swapped(adapt(make("llama", 5)))
    loss_of(model, 0).backward()
    wanted = gradients(model)
    checkpoint(lambda: loss_of(model, 0), use_reentrant=False).backward()
    assert_close(gradients(model), wanted)


def test_nothing_is_kept_without_gradients() -> None:
    model = swapped(adapt(make("llama", 6)))
    wanted = loss_of(model, 0)
    with torch.no_grad():
        loss = loss_of(model, 0)
    assert not loss.requires_grad
    assert torch.equal(loss, wanted)
    with torch.inference_mode():
        assert torch.equal(loss_of(model, 0), wanted)


# Dropout


def dropping(seed: int = 7) -> Any:
    """LoRA dropout in both layers, and dropout of attention weights."""
    model = make("qwen2", seed, attention_dropout=0.3, dtype=torch.float64)
    return adapt(model, lora_dropout=0.2)


def seeded(model: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with packed_attention_on(model):
        return batch_loss(model, packed(rows(0, (9, 5))))[0]


@pytest.mark.parametrize("keep", EVERY)
def test_gradients_are_those_of_the_function_that_was_drawn(keep: Keep) -> None:
    """Against central differences with the same draw."""
    model = swapped(dropping(), keep)
    seeded(model, 1).backward()
    grads = gradients(model)
    assert grads
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for name, parameter in model.named_parameters():
        if name not in grads:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                values.append(seeded(model, 1).item())
            parameter += step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=1e-5, abs=1e-6), name


def test_draws_differ_and_repeat() -> None:
    model = swapped(dropping())
    losses = [seeded(model, seed).item() for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    with packed_attention_on(model):  # no draw of the same layer twice
        again = [batch_loss(model, packed(rows(0, (9, 5))))[0].item() for _ in range(2)]
    assert again[0] != again[1]


def test_evaluation_drops_nothing() -> None:
    model = dropping()
    other = twin(model).eval()
    swapped(model).eval()
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids(0), use_cache=False).logits for each in (model, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_mean_over_draws_is_the_value_without() -> None:
    """For one adapter behind attention: what follows it bends the noise a little."""
    model = swapped(adapt(make("llama", 8, num_hidden_layers=1, dtype=torch.float64), ["o_proj"], lora_dropout=0.5))

    def output() -> Tensor:
        return model(input_ids=ids(0), use_cache=False, output_hidden_states=True).hidden_states[-1]

    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([output() for _ in range(400)])
        model.eval()
        quiet = output()
    assert draws.std(0).mean() > 0.01
    assert (draws.mean(0) - quiet).norm() < 0.15 * draws.std(0).norm()


@pytest.mark.parametrize("keep", EVERY)
def test_training_with_dropout_of_attention_weights(keep: Keep) -> None:
    model = swapped(adapt(make("llama", 9, attention_dropout=0.2)), keep)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        loss = loss_of(model, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
