"""The engine against Hugging Face and PEFT, eager and row by row: losses and every gradient, for every family."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.families import FAMILIES, adapt, gradients, make, packed, reference_loss, rows, twin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gazelle import accelerate, explain
from gazelle.engine.dropout import dropped
from gazelle.engine.keep import AWAY, CHOICES, KEEP, OUTPUT_AWAY, Keep
from gazelle.models import swap
from gazelle.models.packed import packed_attention_on
from gazelle.models.swap import swapped_layers
from gazelle.train.dataset import labelled_targets
from gazelle.train.loss import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")
CHUNKED = Keep(mlp=False, chunk=5)
# Of linear layers; Phi-3 has others.
SUBSETS = {"q": ["q_proj"], "down": ["down_proj"], "some": ["v_proj", "o_proj", "up_proj"]}
PHI3_SUBSETS = {"q": ["qkv_proj"], "down": ["down_proj"], "some": ["o_proj", "gate_up_proj"]}
SEEDS = {name: number for number, name in enumerate(FAMILIES)}
Result = tuple[Tensor, dict[str, Tensor]]


class Wide(TorchFunctionMode):
    """Hugging Face's detours through float32 lead through float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        options = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **options)


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that runs as Hugging Face wrote it would pass all of this."""
    not_here = swap._not_here

    def strict(*args: Any) -> None:
        assert (reason := not_here(*args)) is None, reason

    def fail(message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(swap, "_not_here", strict)
    monkeypatch.setattr(swap, "say_once", fail)


@pytest.fixture
def wide() -> Iterator[None]:
    with Wide():
        yield


def subset(family: str, name: str) -> list[str]:
    return (PHI3_SUBSETS if FAMILIES[family][0] == "Phi3" else SUBSETS)[name]


def reference(model: Any, texts: list[Tensor]) -> Result:
    loss = reference_loss(model, texts)
    loss.backward()
    return loss.detach(), gradients(model)


def engine(model: Any, texts: list[Tensor], keep: Keep = KEEP) -> Result:
    """Of packed rows."""
    accelerate(model)
    assert not [part for part in explain(model) if part.reason]
    for layer in swapped_layers(model):
        layer.gazelle.keep = keep
    with packed_attention_on(model):
        loss, _ = batch_loss(model, packed(texts, model.device))
    loss.backward()
    return loss.detach(), gradients(model)


def engine_in_place(model: Any, texts: list[Tensor]) -> Result:
    """With adapters' gradients added to buffers by a kernel, as the trainer has it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    swap.add_gradients_in_place(accelerate(model), True)
    return engine(model, texts)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_close(ours: Result, theirs: Result, loss: float = 1e-12, gradient: float = 1e-10) -> None:
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=loss)
    assert ours[1].keys() == theirs[1].keys()
    assert ours[1]
    for name, expected in theirs[1].items():
        assert ours[1][name].dtype == expected.dtype
        assert error(ours[1][name], expected) <= gradient, name


def trained(model: Any) -> Any:
    """Every weight is trained."""
    return model.requires_grad_(True)


# float64: any mistake shows


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_all_linears(family: str, tied: bool, wide: None) -> None:
    model = adapt(make(family, SEEDS[family] + 100 * tied, tied=tied, dtype=torch.float64))
    assert_close(engine(twin(model), rows()), reference(model, rows()))


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_some_linears(family: str, name: str, wide: None) -> None:
    model = adapt(make(family, 20 + SEEDS[family], dtype=torch.float64), subset(family, name))
    assert_close(engine(twin(model), rows()), reference(model, rows()))


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_one(family: str, wide: None) -> None:
    model = adapt(make(family, 40 + SEEDS[family], dtype=torch.float64), r=1, alpha=1)
    assert_close(engine(twin(model), rows()), reference(model, rows()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_trained(family: str, tied: bool, wide: None) -> None:
    model = trained(make(family, 60 + SEEDS[family], tied=tied, dtype=torch.float64))
    ours = engine(twin(model), rows())
    assert ours[1].keys() == dict(model.named_parameters()).keys()
    assert_close(ours, reference(model, rows()))


@pytest.mark.parametrize("keep", [*CHOICES.values(), AWAY, OUTPUT_AWAY, CHUNKED],
                         ids=[*CHOICES, "away", "output away", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_with_each_choice(family: str, keep: Keep, wide: None) -> None:
    """As any loop gives it: ids and labels."""
    model = adapt(make(family, 80 + SEEDS[family], dtype=torch.float64))
    text = rows(1, (13,))
    theirs = reference(twin(model), text)
    accelerate(model)
    for layer in swapped_layers(model):
        layer.gazelle.keep = keep
    loss = model(input_ids=text[0][None], labels=packed(text)["labels"], num_items_in_batch=1).loss
    loss.backward()
    assert_close((loss.detach(), gradients(model)), theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(family: str, side: str, wide: None) -> None:
    model = adapt(make(family, 120 + SEEDS[family], dtype=torch.float64))
    texts = rows(2, (9, 14, 6))
    ids, mask, labels = (torch.full((3, 14), value) for value in (0, 0, -100))
    wanted = packed(texts)["labels"][0].split([len(text) for text in texts])
    for number, text in enumerate(texts):
        span = slice(14 - len(text), None) if side == "left" else slice(len(text))
        ids[number, span], mask[number, span], labels[number, span] = text, 1, wanted[number]
    theirs = reference(twin(model), texts)
    accelerate(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    loss = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels, num_items_in_batch=1).loss
    loss.backward()
    assert_close((loss.detach(), gradients(model)), theirs)


@pytest.mark.parametrize("options", [
    {"bias": "all"}, {"bias": "lora_only"}, {"use_rslora": True},
    {"rank_pattern": {"q_proj": 7, "up_proj": 1}, "alpha_pattern": {"k_proj": 3, "down_proj": 40}},
    {"targets": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"targets": ["v_proj", "gate_proj"], "layers_to_transform": [0]},
], ids=["bias", "bias of adapted", "rslora", "ranks", "last layer", "first layer"])
def test_options_of_lora(options: dict[str, Any], wide: None) -> None:
    model = adapt(make("llama", 5, dtype=torch.float64), **options)
    if "bias" in options:
        assert any(name.endswith("bias") and p.requires_grad for name, p in model.named_parameters())
    assert_close(engine(twin(model), rows()), reference(model, rows()))


@pytest.mark.parametrize("pattern", ["q_proj.weight", "norm", "up_proj", "layers.0.", "v_proj.bias", "embed_tokens",
                                     "lm_head"])
def test_some_weights_trained(pattern: str, wide: None) -> None:
    model = make("llama", 6, tied=False, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern in name)
    assert_close(engine(twin(model), rows()), reference(model, rows()))


def test_adapters_beside_trained_weights(wide: None) -> None:
    model = adapt(make("qwen3", 7, dtype=torch.float64))
    for name, parameter in model.named_parameters():
        if "norm" in name or "k_proj.base_layer" in name or "down_proj.base_layer" in name:
            parameter.requires_grad_(True)
    assert_close(engine(twin(model), rows()), reference(model, rows()))


class SameMask(nn.Module):
    """PEFT's dropout with the engine's mask."""

    def __init__(self, seed: int, stream: int) -> None:
        super().__init__()
        self.seed, self.stream = torch.tensor([seed]), stream

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x[0], 0.3, self.seed, self.stream)[None]


@pytest.mark.parametrize("keep", [*CHOICES.values(), AWAY, OUTPUT_AWAY, CHUNKED],
                         ids=[*CHOICES, "away", "output away", "chunked"])
def test_dropout_of_lora(keep: Keep, wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(make("llama", 8, dtype=torch.float64), lora_dropout=0.3)
    seeds = iter(range(1, 9))
    monkeypatch.setattr("gazelle.engine.layer.new_seed", lambda device: torch.tensor([next(seeds)], device=device))
    text = rows(3, (15,))
    ours = engine(twin(model), text, keep)
    assert next(seeds, None) is None
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for number, layer in enumerate(model.get_base_model().model.layers):
        for group, names in enumerate(groups):
            for stream, name in enumerate(names):
                block = layer.mlp if name in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
                getattr(block, name).lora_dropout["default"] = SameMask(1 + 4 * number + group, stream)
    assert_close(ours, reference(model, text))


# float32: rounding is no worse than Hugging Face's


@pytest.mark.parametrize("case", ["all", "q", "one", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_in_float32(family: str, case: str) -> None:
    model = make(family, 200 + SEEDS[family])
    if case == "full":
        trained(model)
    else:
        targets = subset(family, "q") if case == "q" else "all-linear"
        model = adapt(model, targets, r=1 if case == "one" else 4)
    with Wide():
        exact = reference(twin(model).double(), rows())
    ours, theirs = engine(twin(model), rows()), reference(model, rows())
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    assert ours[1].keys() == exact[1].keys()
    for name, expected in exact[1].items():
        allowed = max(1e-5, 2 * error(theirs[1][name], expected))
        assert ours[1][name].dtype == torch.float32
        assert error(ours[1][name], expected) <= allowed, name


@pytest.mark.parametrize("case", ["lora", "dropout", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_changes_no_bit(family: str, case: str) -> None:
    model = make(family, 220 + SEEDS[family])
    model = trained(model) if case == "full" else adapt(model, lora_dropout=0.2 if case == "dropout" else 0.0)
    results = {}
    for name, keep in (*CHOICES.items(), ("away", AWAY), ("output away", OUTPUT_AWAY), ("chunked", CHUNKED)):
        torch.manual_seed(0)
        results[name] = engine(twin(model), rows(), keep)
    loss, grads = results.pop("keep")
    chunked = results.pop("chunked")
    for name, (other, others) in results.items():
        assert torch.equal(other, loss), name
        for key, grad in grads.items():
            if "down_proj.lora_B" in key:  # what down is given lies otherwise in memory when it is made again
                assert error(others[key], grad) <= 1e-6, (name, key)
            else:
                assert torch.equal(others[key], grad), (name, key)
    assert_close(chunked, (loss, grads), 1e-6, 1e-5)  # matrix products of other shapes round otherwise


@pytest.mark.parametrize("family", ["phi4-mini", "llama3"])
def test_rows_beyond_the_length_before_the_stretch(family: str, wide: None) -> None:
    model = adapt(make(family, 9, dtype=torch.float64))
    text = rows(4, (90,))
    assert_close(engine(twin(model), text), reference(model, text))


# On a GPU, in the type that models are trained in


def large(family: str, seed: int) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
                             "max_position_embeddings": 1024}
    if family == "phi4-mini":
        factors = [1.0 + index / 10 for index in range(16)]
        sizes |= {"original_max_position_embeddings": 1024, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 1024, "partial_rotary_factor": 0.5}}
    if "sliding_window" in FAMILIES[family][1]:
        sizes["sliding_window"] = 100
    if family == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if family == "smollm3":
        sizes["no_rope_layers"] = [1, 0, 1, 1]
    return adapt(make(family, seed, **sizes), r=8)


def token_losses(model: Any, texts: list[Tensor]) -> Tensor:
    """Of every labelled token: errors of their sum are too few numbers to compare."""
    with torch.no_grad():
        if swapped_layers(model):
            with packed_attention_on(model):
                batch = packed(texts, "cuda")
                scores = batch_loss(model, batch, logits=True)[1].logits[0]
                targets = labelled_targets(batch["labels"])[1]
        else:
            scores = torch.cat([model(input_ids=text[None].cuda(), use_cache=False).logits[0] for text in texts])
            positions, targets = labelled_targets(packed(texts, "cuda")["labels"])
            scores = scores[positions]
    return torch.nn.functional.cross_entropy(scores.double(), targets, reduction="none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # torch.compile, by which attention with soft-caps runs, warns about many things
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_in_bfloat16(family: str) -> None:
    """Of weights that bfloat16 holds; the reference is Hugging Face in float32."""
    texts = rows(5, (300, 77, 513))
    runs = {"engine": engine, "in place": engine_in_place, "hugging face": reference}
    sums = {name: [0.0, 0.0] for name in runs}
    for seed in range(3):
        model = large(family, seed).to("cuda", torch.bfloat16)
        wide = twin(model).float()
        exact, exact_losses = reference(wide, texts), token_losses(wide, texts)
        assert exact[0].item() == pytest.approx(exact_losses.sum().item(), rel=1e-4)
        whole = torch.cat([grad.flatten() for grad in exact[1].values()])
        for name, run in runs.items():
            each = twin(model)
            loss, grads = run(each, texts)
            assert loss.item() == pytest.approx(exact[0].item(), rel=0.01)
            together = torch.cat([grads[key].flatten() for key in exact[1]])
            sums[name][0] += error(token_losses(each, texts), exact_losses)
            sums[name][1] += error(together, whole)
    for name in ("engine", "in place"):
        for ours, theirs in zip(sums[name], sums["hugging face"], strict=True):
            assert math.isfinite(ours)
            assert ours <= 1.1 * theirs, sums
