"""Layers whose weights stream compute what they computed before, to the bit; afterwards everything is at home again."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.families import adapt, gradients, make, packed, quantized, rows, twin
from torch import Tensor, nn

from gazelle import accelerate
from gazelle.engine.keep import CHOICES, KEEP, Keep
from gazelle.engine.outline import Batch
from gazelle.engine.plan import _Draft
from gazelle.models.linears import base_linear
from gazelle.models.outline import outline_of
from gazelle.models.packed import packed_attention_on
from gazelle.models.streamed import can_stream, weights_streamed
from gazelle.models.swap import linear_modules, swapped_layers
from gazelle.quantize.bnb import dequantize_linear
from gazelle.train.loss import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 4
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS = ["llama", "gemma3", "phi3", "nf4", "nf4 plain"]


def model_of(kind: str, folder: Path) -> Any:
    if kind.startswith("nf4"):
        return quantized(folder, layers=LAYERS, bnb_4bit_use_double_quant=kind == "nf4", **NF4)
    options = {"layer_types": ["sliding_attention", "full_attention"] * 2} if kind == "gemma3" else {}
    return adapt(make(kind, 1, num_hidden_layers=LAYERS, **options))


def bases(model: Any) -> list[Any]:
    return [base_linear(linear) for module in swapped_layers(model) for linear in linear_modules(module)]


def numbers(model: Any) -> list[Tensor]:
    return [dequantize_linear(base).detach().clone() for base in bases(model)]


def train(model: Any, steps: int = 3) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses and gradients of steps, between which the model changes."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses, grads = [], []
    with packed_attention_on(model):
        for seed in range(steps):
            loss, _ = batch_loss(model, packed(rows(seed)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            grads.append(gradients(model))
    return losses, grads


def assert_equal(ours: tuple[list[float], list[dict[str, Tensor]]],
                 theirs: tuple[list[float], list[dict[str, Tensor]]]) -> None:
    assert ours[0] == theirs[0]
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys() != set()
        assert all(torch.equal(mine[name], grad) for name, grad in other.items())


def assert_at_home(model: Any, wanted: list[Tensor], parameters: dict[str, nn.Parameter]) -> None:
    assert all(torch.equal(found, number) for found, number in zip(numbers(model), wanted, strict=True))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for module in swapped_layers(model):
        assert module.gazelle.home is None
        assert module.gazelle.layer is None or module.gazelle.layer.stream is None


@pytest.mark.parametrize("count", range(1, LAYERS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(kind: str, count: int, tmp_path: Path) -> None:
    model = accelerate(model_of(kind, tmp_path))
    other = twin(model)
    wanted, parameters = numbers(model), dict(model.named_parameters())
    assert can_stream(model)
    with weights_streamed(model, count):
        assert [base.weight.numel() == 0 for base in bases(model)] == [
            number < count for number, module in enumerate(swapped_layers(model)) for _ in linear_modules(module)]
        ours = train(model)
    assert_at_home(model, wanted, parameters)
    assert_equal(ours, train(other))
    assert_equal(train(model), train(other))  # and they go on alike
    assert_at_home(model, wanted, parameters)


@pytest.mark.parametrize("keep", [*CHOICES.values(), Keep(mlp=False, chunk=5)], ids=[*CHOICES, "chunked"])
def test_with_each_choice(keep: Keep) -> None:
    model = accelerate(adapt(make("qwen3", 2, num_hidden_layers=LAYERS), lora_dropout=0.2))
    other = twin(model)
    for module in swapped_layers(model):
        module.gazelle.keep = keep
    results = []
    for each, count in ((model, 3), (other, 0)):
        torch.manual_seed(0)
        if count:
            with weights_streamed(each, count):
                results.append(train(each))
        else:
            results.append(train(each))
    assert_equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_answering_meanwhile(kind: str, tmp_path: Path) -> None:
    """Between steps: generation with a cache, which the engine does not run, and evaluation, which it does."""
    model = accelerate(model_of(kind, tmp_path))
    other = twin(model)
    ids = torch.stack(rows(3, (6, 6)))

    def answer(each: Any) -> tuple[Tensor, Tensor]:
        each.eval()
        with torch.no_grad():
            logits = each(input_ids=ids, use_cache=False).logits
        tokens = each.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        each.train()
        return logits, tokens

    wanted = answer(other), train(other), answer(other), train(other)
    with weights_streamed(model, 3):
        found = answer(model), train(model), answer(model), train(model)
        assert [base.weight.numel() == 0 for base in bases(model)].count(True) == 3 * len(bases(model)) // LAYERS
    for turn in (0, 2):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[turn], wanted[turn], strict=True))
        assert_equal(found[turn + 1], wanted[turn + 1])


def test_adapters_switched_off_meanwhile() -> None:
    model = accelerate(adapt(make("llama", 6, num_hidden_layers=LAYERS)))
    other = twin(model)
    ids = rows()[2][None]

    def answer(each: Any) -> Tensor:
        with torch.no_grad():
            return each(input_ids=ids, use_cache=False).logits

    with weights_streamed(model, 3):
        for _ in range(2):
            with model.disable_adapter(), other.disable_adapter():
                torch.testing.assert_close(answer(model), answer(other), rtol=1e-5, atol=1e-5)
            assert torch.equal(answer(model), answer(other))
            assert_equal(train(model, 1), train(other, 1))


def test_dropout_of_a_model_that_was_answering() -> None:
    """It is the mode during a pass that counts, not the one in which the weights left."""
    model = accelerate(adapt(make("llama", 7, num_hidden_layers=LAYERS), lora_dropout=0.3))
    other = twin(model)
    results = []
    model.eval()
    with weights_streamed(model, 2):
        for each in (model, other):
            torch.manual_seed(0)
            results.append(train(each.train()))
    assert_equal(*results)


@pytest.mark.parametrize("kind", ["llama", "phi3", "nf4"])
def test_a_checkpoint_written_meanwhile_is_whole(kind: str, tmp_path: Path) -> None:
    model = accelerate(model_of(kind, tmp_path))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inner = model.get_base_model()
    with weights_streamed(model, 3):
        during = model.state_dict()
        if kind == "llama":
            inner.save_pretrained(tmp_path / "whole")
        train(model, 1)
        assert [base.weight.numel() == 0 for base in bases(model)].count(True) == 3 * len(bases(model)) // LAYERS
    assert during.keys() == before.keys() == model.state_dict().keys()
    assert all(torch.equal(during[name], tensor) for name, tensor in before.items() if "lora_" not in name)
    if kind == "llama":
        saved = {name: tensor for file in (tmp_path / "whole").glob("*.safetensors")
                 for name, tensor in load_file(file).items()}
        names = {name.replace("base_model.model.", "").replace("base_layer.", ""): name for name in before}
        written = {name.replace("base_layer.", ""): tensor for name, tensor in saved.items()}
        assert len(written) > 10 * LAYERS
        assert all(torch.equal(tensor, before[names[name]]) for name, tensor in written.items())


@pytest.mark.parametrize("kind", ["llama", "nf4"])
@pytest.mark.parametrize("where", ["block", "forward", "backward", "generate"])
def test_after_an_error_everything_is_at_home(where: str, kind: str, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(model_of(kind, tmp_path))
    other = twin(model)
    wanted, parameters = numbers(model), dict(model.named_parameters())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    broken = {"forward": "gazelle.engine.passes.gated", "backward": "gazelle.engine.passes.gated_backward",
              "generate": "transformers.models.llama.modeling_llama.LlamaMLP.forward"}
    with pytest.raises(ZeroDivisionError), weights_streamed(model, 2):
        train(model, 1)
        if where in broken:
            monkeypatch.setattr(broken[where], fail)
        if where == "block":
            fail()
        if where == "generate":
            model.generate(input_ids=rows()[0][None], max_new_tokens=2, do_sample=False)
        train(model, 1)
    monkeypatch.undo()
    model.zero_grad()
    assert_at_home(model, wanted, parameters)
    train(other, 1)
    assert_equal(train(model), train(other))


def test_if_it_cannot_begin_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(adapt(make("llama", 3, num_hidden_layers=LAYERS)))
    other = twin(model)
    train(model, 1), train(other, 1)
    wanted, parameters = numbers(model), dict(model.named_parameters())
    empty, calls = torch.empty, []

    def scarce(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") == torch.uint8:
            calls.append(1)
            if len(calls) == 4:  # the first of two on the device, after three on the host
                raise torch.OutOfMemoryError
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.OutOfMemoryError), weights_streamed(model, 3):
        pass
    monkeypatch.undo()
    assert_at_home(model, wanted, parameters)
    assert_equal(train(model), train(other))


@pytest.mark.parametrize("kind", ["llama", "nf4"])
def test_if_there_is_no_room_to_come_home_nothing_is_lost(kind: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(model_of(kind, tmp_path))
    wanted, parameters = numbers(model), dict(model.named_parameters())

    def no_room(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError), weights_streamed(model, 2):
        monkeypatch.setattr(Tensor, "to", no_room)
    monkeypatch.undo()
    assert_at_home(model, wanted, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_matrices_that_streamed_weights_are_written_to(kind: str, tmp_path: Path) -> None:
    model = accelerate(model_of(kind, tmp_path))
    outline = outline_of(model)
    for streamed in (0, 2):
        draft = _Draft(outline, Batch(8, 8, 8), None, [KEEP], embedding_on_host=False, streamed=streamed)
        with weights_streamed(model, streamed) if streamed else contextlib.nullcontext():
            train(model, 1)
        assert draft.static["dequantised weights"] == swapped_layers(model)[0].gazelle.engine.scratch.nbytes
        if not streamed:
            assert (draft.static["dequantised weights"] > 0) == kind.startswith("nf4")


def test_one_number_after_another() -> None:
    model = accelerate(adapt(make("llama", 4, num_hidden_layers=LAYERS)))
    other = twin(model)
    for count in (2, 4, 1):
        with weights_streamed(model, count):
            ours = train(model, 1)
        assert_equal(ours, train(other, 1))


def test_which_models_can() -> None:
    for family in ("llama", "phi3", "gemma2"):
        assert can_stream(accelerate(adapt(make(family, 5))))
    frozen = accelerate(make("llama", 5).requires_grad_(False))
    assert can_stream(frozen)
    swapped_layers(frozen)[1].mlp.up_proj.weight.requires_grad_(True)
    assert not can_stream(frozen)
    assert not can_stream(accelerate(make("llama", 5)))


def test_int8_cannot(tmp_path: Path) -> None:
    assert not can_stream(accelerate(quantized(tmp_path, load_in_8bit=True)))
