"""Any loop trains an accelerated model as it would train it without; changes are noticed, and undoing is exact."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.models.families import FAMILIES, adapt, gradients, make, packed, quantized, reference_loss, rows, twin
from torch import Tensor, nn

import gazelle
from gazelle import accelerate, explain, restore
from gazelle.base import log
from gazelle.base.errors import ModelError, OptionError
from gazelle.engine import passes
from gazelle.models import swap
from gazelle.models.swap import runs_on_engine, swapped_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that ran on the engine."""
    seen: list[int] = []
    original = swap.run_layer

    def run(*args: Any) -> Tensor:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(swap, "run_layer", run)
    return seen


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What gazelle says, as if it had said nothing yet."""
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, "gazelle")
    return caplog


def ids(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, shape or (2, 11), generator=generator)


def step(model: Any, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch."""
    batch = ids(seed)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(model: Any, other: Any, tolerance: float = 1e-5) -> None:
    (loss, grads), (wanted, wanted_grads) = step(model), step(other)
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-8, name  # some are zero but for rounding


# Undoing


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_restored_models_are_what_they_were(family: str, adapted: bool) -> None:
    model = make(family, 1)
    model = adapt(model) if adapted else model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: (type(module), {key for key in vars(module) if not key.startswith("_")})
               for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = model(input_ids=ids(), use_cache=False).logits
    assert accelerate(model) is model
    assert runs_on_engine(model)
    step(model)
    assert restore(model) is model
    assert {name: (type(module), {key for key in vars(module) if not key.startswith("_")})
            for name, module in model.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, before)
    assert not swapped_layers(model)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3"])
def test_generation_is_the_same(family: str) -> None:
    model = adapt(make(family, 2)).eval()

    def answer() -> Tensor:
        return model.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8,
                              do_sample=False)

    before = answer()
    accelerate(model)
    assert torch.equal(answer(), before)
    step(model.train())
    assert torch.equal(answer(), before)
    restore(model)
    assert torch.equal(answer(), before)


def test_swapping_twice_changes_nothing() -> None:
    model = adapt(make("qwen3", 3))
    kinds = [type(module) for module in accelerate(model).modules()]
    engines = {id(layer.gazelle.engine) for layer in swapped_layers(model)}
    assert [type(module) for module in accelerate(model).modules()] == kinds
    assert {id(layer.gazelle.engine) for layer in swapped_layers(model)} == engines
    assert len(engines) == 1


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    model = make("llama", 4)
    model.save_pretrained(tmp_path / "before")
    step(accelerate(model))
    model.save_pretrained(tmp_path / "after")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = type(restore(twin(model))).from_pretrained(tmp_path / "after", attn_implementation="eager")
    assert {name.name for name in (tmp_path / "after").iterdir()} == {n.name for n in (tmp_path / "before").iterdir()}
    loaded = torch.load(tmp_path / "state.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert torch.equal(loaded[name], value)
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_a_swapped_model_looks_like_the_original() -> None:
    import inspect

    model = make("llama", 5)
    name, signature = type(model).__name__, inspect.signature(model.forward)
    accelerate(model)
    assert type(model).__name__ == name
    assert inspect.signature(model.forward) == signature


# Explaining


def test_explain() -> None:
    model = adapt(make("llama", 6))
    names = ["model.layers.0", "model.layers.1", "model.norm", "lm_head and loss"]
    parts = explain(model)
    assert [part.name for part in parts] == names
    assert {part.reason for part in parts} == {"the model is not accelerated"}
    parts = explain(accelerate(model))
    assert [part.name for part in parts] == names
    assert [part.kind for part in parts] == ["LlamaDecoderLayer"] * 2 + ["LlamaRMSNorm", "LlamaForCausalLM"]
    assert {part.reason for part in parts} == {""}


def other_model(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                             "attn_implementation": "eager"}
    sizes |= {"GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
              "OPT": {"hidden_size": 24, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "word_embed_proj_dim": 24, "dropout": 0},
              "OLMo2": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
              "Cohere": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}}[
                  name]
    name = name.replace("OLMo", "Olmo")
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


@pytest.mark.parametrize("name", ["GPT2", "OPT", "OLMo2", "Cohere"])
def test_unknown_families_stay_as_they_are(name: str, said: pytest.LogCaptureFixture, runs: list[int]) -> None:
    model = other_model(name)
    other = twin(model)
    kind = model.config.model_type
    accelerate(accelerate(model))
    assert said.text.count(f"the engine does not know {kind}") == 1
    assert not runs_on_engine(model)
    assert f"the engine does not know {kind}" in {part.reason for part in explain(model)}
    assert_same_step(model, other)
    assert not runs
    assert type(restore(model)) is type(other)


def test_the_head_of_an_unknown_family_is_fused_if_it_is_plain(said: pytest.LogCaptureFixture) -> None:
    assert explain(accelerate(other_model("OLMo2")))[-1].reason == ""
    reason = explain(accelerate(other_model("Cohere")))[-1].reason  # it scales its logits by a name of its own
    assert reason == "it does something to its logits that the engine does not know"
    assert f"the head is not fused with the loss: {reason}" in said.text


def hooked(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def hooked_inside(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: None)


def hooked_norm(model: Any) -> None:
    model.get_base_model().model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda *_: None)


def with_two_adapters(model: Any) -> None:
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


def with_another_linear(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.get_base_model().model.layers[1].self_attn.o_proj.base_layer.__class__ = Doubled


@pytest.mark.parametrize(("options", "change", "reason", "count"), [
    ({}, hooked, "hooks on its linear layers", 1),
    ({}, hooked_inside, "hooks on its parts", 1),
    ({}, hooked_norm, "hooks on its parts", 1),
    ({}, with_two_adapters, "several adapters active at a time", 2),
    ({}, with_another_linear, "a linear layer of type", 1),
    ({"use_dora": True}, None, "Dora adapters", 2),
    ({"lora_bias": True}, None, "adapters with a bias", 2),
])
def test_unsupported_options_are_named(options: dict[str, Any], change: Any, reason: str, count: int, runs: list[int],
                                       said: pytest.LogCaptureFixture) -> None:
    """Before the swap; those that come after it are noticed as well."""
    model = adapt(make("llama", 7), **options)
    late = accelerate(twin(model)) if change else None
    if change:
        change(model)
    other = twin(model)
    accelerate(model)
    refused = [part.reason for part in explain(model) if part.name.startswith("model.layers") and part.reason]
    assert len(refused) == count
    assert all(reason in given for given in refused)
    assert f"{count} of 2 layers run as Hugging Face wrote them: " in said.text
    assert_same_step(model, other, 1e-4)
    assert len(runs) == 2 - count
    if late is not None:
        step(late)
        change(late)
        runs.clear()
        assert_same_step(late, other, 1e-4)
        assert len(runs) == 2 - count
        assert reason in said.text.partition("a layer runs as Hugging Face wrote it")[2]
        assert [reason in part.reason for part in explain(late)].count(True) == count


@pytest.mark.parametrize(("options", "reason"), [({"hidden_act": "relu"}, "activation relu"),
                                                 ({"use_bidirectional_attention": True}, "bidirectional attention")])
def test_unsupported_configs_are_named(options: dict[str, Any], reason: str, said: pytest.LogCaptureFixture) -> None:
    family = "gemma3" if "use_bidirectional_attention" in options else "llama"
    model = accelerate(make(family, 8, **options))
    assert [part.reason for part in explain(model)][:2] == [reason] * 2
    assert not swapped_layers(model)


def test_an_unknown_precision_is_refused() -> None:
    model = make("llama", 9)
    with pytest.raises(OptionError, match="auto or fp8"):
        accelerate(model, precision="bf16")
    assert not swapped_layers(model)


def test_fp8_needs_a_gpu() -> None:
    model = make("llama", 9)
    with pytest.raises(OptionError, match="cannot compute in fp8"):
        accelerate(model, precision="fp8")
    assert not swapped_layers(model)


def head_hooked(model: Any) -> None:
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 2)


def head_saved(model: Any) -> None:
    torch.manual_seed(0)
    model.add_adapter("new", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"],
                                        init_lora_weights=False))
    model.set_adapter("new")
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["new"].weight.mul_(1.3)


def head_adapted(model: Any) -> None:
    torch.manual_seed(0)
    model.add_adapter("new", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    model.set_adapter("new")


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("change", [head_hooked, head_saved, head_adapted])
def test_heads_with_something_around_them(change: Any, late: bool, runs: list[int]) -> None:
    model = adapt(make("llama", 27, tied=False))
    other = twin(model)
    if late:
        step(accelerate(model))
    change(model)
    change(other)
    if not late:
        accelerate(model)
    reason = explain(model)[-1].reason
    assert reason == ("hooks on its head" if change is head_hooked else "its head is no plain linear layer")
    runs.clear()
    assert_same_step(model, other)
    assert len(runs) == 2


# Changes after the swap


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)


def replace_weight(model: Any) -> None:
    layer = model.get_base_model().model.layers[0]
    for part in (layer.self_attn.k_proj, layer.mlp.down_proj):
        torch.manual_seed(3)
        part.base_layer.weight = nn.Parameter(torch.randn_like(part.base_layer.weight), requires_grad=False)


def replace_data(model: Any) -> None:
    part = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    part.weight.data = part.weight.data * 2


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def load_state(model: Any) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def replace_norm(model: Any) -> None:
    norm = model.get_base_model().model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2, requires_grad=False)


def replace_factors(model: Any) -> None:
    part = model.get_base_model().model.layers[1].self_attn.q_proj
    part.lora_A["default"].weight = nn.Parameter(part.lora_A["default"].weight.detach() * 3)


def another_adapter(model: Any) -> None:
    torch.manual_seed(4)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.set_adapter("other")


def merged(model: Any) -> None:
    model.merge_adapter()


def merged_and_back(model: Any) -> None:
    model.merge_adapter()
    model(input_ids=ids())
    model.unmerge_adapter()


def switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)


def norms_trained(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)


def all_trained(model: Any) -> None:
    model.requires_grad_(True)


def frozen_factors(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name:
            parameter.requires_grad_(False)


def bias_replaced(model: Any) -> None:
    part = model.get_base_model().model.layers[1].self_attn.v_proj.base_layer
    part.bias = nn.Parameter(part.bias.detach() * 2, requires_grad=False)


def bias_removed(model: Any) -> None:
    model.get_base_model().model.layers[1].self_attn.v_proj.base_layer.bias = None


def head_resized(model: Any) -> None:
    torch.manual_seed(5)
    model.get_base_model().resize_token_embeddings(104, mean_resizing=False)


def doubled(model: Any) -> None:
    model.double()


@pytest.mark.parametrize("change", [
    rescale, replace_weight, replace_data, change_in_place, load_state, replace_norm, replace_factors, another_adapter,
    merged, merged_and_back, switched_off, norms_trained, all_trained, frozen_factors, bias_replaced, bias_removed,
    head_resized, doubled,
])
def test_changes_are_noticed(change: Any, runs: list[int]) -> None:
    model = adapt(make("llama", 10))
    other = twin(model)
    step(accelerate(model))
    for each in (model, other):
        change(each)
        if change is merged:
            each.requires_grad_(True)
    runs.clear()
    assert_same_step(model, other, 2e-5)
    assert len(runs) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weights_stay_where_they_are_from_training_to_evaluation_and_back(dropout: float) -> None:
    """Steps recorded as graphs read them there; and laying them side by side again would copy the whole model."""
    model = accelerate(adapt(make("llama", 12), lora_dropout=dropout))
    other = twin(model)
    held, places = [], []
    for training in (True, False, True):
        for each in (model, other):
            torch.manual_seed(0)
            each.train(training)
            held.append(step(each) if training else (each(input_ids=ids(), use_cache=False).logits.detach(), {}))
        places.append([projection.kept for module in swapped_layers(model)
                       for projection in module.gazelle.layer.projections])
        other = twin(other)  # reads everything anew
    for later in places[1:]:
        assert all(one is another for one, another in zip(places[0], later, strict=True))
    for (ours, grads), (theirs, wanted) in zip(held[::2], held[1::2], strict=True):
        assert torch.equal(ours, theirs)
        assert grads.keys() == wanted.keys() and all(torch.equal(grads[name], wanted[name]) for name in grads)


def test_a_backward_pass_after_another_adapter_answered() -> None:
    """As in preference training: the reference's answer comes between forward and backward."""
    model = adapt(make("llama", 13))
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False))
    results = []
    for each in (twin(model), accelerate(model)):
        for _ in range(2):
            loss = each(input_ids=ids(), labels=ids()).loss
            each.set_adapter("other")
            with torch.no_grad():
                each(input_ids=ids(), labels=ids(), use_cache=False)
            each.set_adapter("default")
            loss.backward()
        results.append(gradients(each))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_that_hooks_keep_stay_what_they_were(late: bool) -> None:
    """The engine's own buffer changes under them from layer to layer."""
    kept: list[dict[str, Tensor]] = []
    for engine in (False, True):
        model = make("llama", 14, num_hidden_layers=3)
        if engine and late:
            step(accelerate(model))
        seen: dict[str, Tensor] = {}

        def keep(module: Any, inputs: Any, outputs: Any, seen: dict[str, Tensor] = seen) -> None:
            seen.update(inputs=inputs[0], outputs=outputs[0])

        model.model.layers[1].register_full_backward_hook(keep)
        if engine:
            accelerate(model)
            assert explain(model)[1].reason == "backward hooks on the layer"
        step(model)
        kept.append(seen)
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-4, atol=1e-5)


def test_adapters_switched_off_for_a_while() -> None:
    """As preference tuning does it for its reference."""
    model = adapt(make("qwen2", 11))
    other = twin(model)
    accelerate(model)
    for _ in range(2):
        assert_same_step(model, other)
        with model.disable_adapter(), other.disable_adapter(), torch.no_grad():
            ours, theirs = (each(input_ids=ids(), use_cache=False).logits for each in (model, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_adapters_put_on() -> None:
    model = make("qwen2", 28)
    other = twin(model)
    step(accelerate(model))
    torch.manual_seed(0)
    model = adapt(model)
    torch.manual_seed(0)
    assert_same_step(model, adapt(other))


def test_adapters_taken_off() -> None:
    model = adapt(make("llama", 12))
    other = twin(model)
    step(accelerate(model))
    merged_model, merged_other = model.merge_and_unload(), other.merge_and_unload()
    for each in (merged_model, merged_other):
        each.requires_grad_(True)
    assert runs_on_engine(merged_model)
    assert_same_step(merged_model, merged_other, 2e-5)


def test_copies_are_independent(runs: list[int]) -> None:
    model = adapt(make("llama", 13))
    wanted = step(accelerate(model))
    copied = copy.deepcopy(model)
    assert runs_on_engine(copied)
    first, second = ({id(layer.gazelle.engine) for layer in swapped_layers(each)} for each in (model, copied))
    assert len(second) == 1
    assert first != second
    change_in_place(copied)
    runs.clear()
    loss, grads = step(model)
    assert len(runs) == 2
    assert torch.equal(loss, wanted[0])
    assert all(torch.equal(grads[name], grad) for name, grad in wanted[1].items())
    other = restore(copy.deepcopy(copied))
    assert_same_step(copied, other)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not storages & {parameter.untyped_storage().data_ptr() for parameter in copied.parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own: attention runs once more in the backward pass, the layers' modules do not."""
    attended = []
    original = passes.attention
    monkeypatch.setattr(passes, "attention", lambda *args: attended.append(1) or original(*args))
    model = adapt(make("gemma3", 14))
    wanted, wanted_grads = step(accelerate(model))
    assert len(attended) == 2
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs.clear()
    loss, grads = step(model)
    assert len(runs) == 2
    assert len(attended) == 2 + 4
    assert torch.equal(loss, wanted)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)


# What is asked of a forward pass


def test_outputs_on_request() -> None:
    model = adapt(make("llama", 15))
    other = twin(model)
    accelerate(model)
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    ours, theirs = (each(input_ids=ids(), **asked) for each in (model, other))
    for kind in ("hidden_states", "attentions"):
        assert len(ours[kind]) == len(theirs[kind]) >= 2
        for a, b in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_step(model, other)


def test_hidden_states_leave_the_engine_on(runs: list[int]) -> None:
    model = adapt(make("llama", 16))
    other = twin(model)
    accelerate(model)
    for _ in range(2):
        ours, theirs = (each(input_ids=ids(), output_hidden_states=True, use_cache=False).hidden_states
                        for each in (model, other))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(runs) == 4


def test_a_loss_of_ones_own(runs: list[int]) -> None:
    """From logits, with nothing said of caches."""
    model = adapt(make("gemma2", 17))
    other = twin(model)
    accelerate(model)
    results = []
    for each in (model, other):
        logits = each(ids(), attention_mask=torch.ones_like(ids())).logits
        logits.softmax(-1).square().sum().backward()
        results.append(gradients(each))
    assert len(runs) == 2
    for name, grad in results[1].items():
        assert (results[0][name] - grad).norm() <= 1e-5 * grad.norm()


def test_evaluation(runs: list[int]) -> None:
    model = adapt(make("qwen3", 18)).eval()
    other = twin(model)
    accelerate(model)
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids(), labels=ids(), use_cache=False) for each in (model, other))
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert len(runs) == 2


def test_a_cache_that_was_asked_for_is_filled(runs: list[int]) -> None:
    model = accelerate(adapt(make("llama", 19)))
    cache = model(input_ids=ids(), use_cache=True).past_key_values
    assert cache.get_seq_length() == ids().shape[1]
    assert not runs


def test_autocast(said: pytest.LogCaptureFixture, runs: list[int]) -> None:
    model = adapt(make("llama", 20))
    other = twin(model)
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (each(input_ids=ids(), use_cache=False).logits for each in (model, other))
    assert torch.equal(ours, theirs)
    assert not runs
    assert "a forward pass runs as Hugging Face wrote it" in said.text and "autocast" in said.text
    half = accelerate(twin(other).bfloat16())
    wanted, _ = step(half)
    runs.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = step(half)
    assert len(runs) == 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    assert grads


# Loops


def loop(model: Any, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for number in range(steps):
        loss = model(input_ids=ids(number % 2), labels=ids(number % 2)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_plain_loop(family: str, adapted: bool, runs: list[int]) -> None:
    model = make(family, 21)
    model = adapt(model) if adapted else model
    other = twin(model)
    losses = loop(accelerate(model))
    assert len(runs) == 12
    assert losses == pytest.approx(loop(other), rel=1e-4)
    assert losses[-1] < losses[0]
    for (name, parameter), wanted in zip(restore(model).named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_trainer_of_transformers(checkpointing: bool, tmp_path: Path, runs: list[int]) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids(number, 9), "labels": ids(number, 9)} for number in range(8)]
    losses = []
    for swapped in (True, False):
        model = adapt(make("llama", 22))
        args = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1,
                                 gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no",
                                 gradient_checkpointing=checkpointing, disable_tqdm=True, use_cpu=True)
        trainer = Trainer(accelerate(model) if swapped else model, args, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(runs) == 16


def test_the_trainer_of_trl(tmp_path: Path, runs: list[int]) -> None:
    trl = pytest.importorskip("trl")
    from tests.data.conftest import small_tokenizer

    from gazelle.data.templates import TEMPLATES, get_template

    tokenizer = small_tokenizer(get_template("chatml"), TEMPLATES["chatml"], "<s>", "<|im_end|>")
    from datasets import Dataset

    data = Dataset.from_dict({"text": [f"{number} gazelles ran past {number} lions" for number in range(8)]})
    losses = []
    for swapped in (True, False):
        model = adapt(make("llama", 23, vocab_size=len(tokenizer)))
        args = trl.SFTConfig(str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[],
                             learning_rate=1e-2, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False)
        trainer = trl.SFTTrainer(accelerate(model) if swapped else model, args, train_dataset=data,
                                 processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs


@pytest.mark.parametrize("how", ["eager", "sdpa", "flash_attention_2", "starts"])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "phi3", "granite"])
def test_rows_packed_by_others(family: str, how: str, runs: list[int]) -> None:
    """Collators such as transformers' for flattened rows say by positions, or by starts, where rows begin."""
    model = adapt(make(family, 29))
    texts = rows(5, (9, 6, 1, 8))
    other = twin(model)
    reference_loss(other, texts).backward()
    accelerate(model)
    config = model.get_base_model().config
    config._attn_implementation_internal = "eager" if how == "starts" else how
    batch = packed(texts)
    if how != "starts":
        batch = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    model(**batch, num_items_in_batch=1).loss.backward()
    assert len(runs) == 2
    theirs = gradients(other)
    for name, grad in gradients(model).items():
        assert (grad - theirs[name]).norm() <= 2e-5 * theirs[name].norm(), name


# Quantised weights


def plain(model: Any) -> Any:
    """The same numbers in ordinary linear layers."""
    from peft.tuners.lora import Linear

    from gazelle.quantize.bnb import dequantize_linear, is_quantized_linear

    model = twin(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and is_quantized_linear(module.get_base_layer()):
            base = module.get_base_layer()
            ordinary = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            ordinary.weight.data = dequantize_linear(base).float()
            if base.bias is not None:
                ordinary.bias.data = base.bias.data.float()
            lora = Linear(ordinary, "default", LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
            for factors in ("lora_A", "lora_B"):
                getattr(lora, factors)["default"].weight.data = getattr(module, factors)["default"].weight.data.clone()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, lora)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    return model.train()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_nf4(family: str, nested: bool, tmp_path: Path, runs: list[int]) -> None:
    model = quantized(tmp_path, family, load_in_4bit=True, bnb_4bit_quant_type="nf4",
                      bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32)
    other, exact = twin(model), plain(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model)
    assert not [part for part in explain(model) if part.reason]
    assert_same_step(model, exact)
    assert_same_step(model, other)
    assert len(runs) == 4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    losses = loop(model)
    assert losses[-1] < losses[0]


def test_int8(tmp_path: Path, runs: list[int]) -> None:
    """bitsandbytes quantises activations as well, which the engine does not: it is nearer to the weights as kept."""
    from gazelle.quantize.bnb import hush_int8_casts

    hush_int8_casts()
    model = quantized(tmp_path, load_in_8bit=True)
    other, exact = twin(model), plain(model)
    accelerate(model)
    assert not [part for part in explain(model) if part.reason]
    assert_same_step(model, exact)
    assert len(runs) == 2
    loss, grads = step(model)
    wanted, wanted_grads = step(other)
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    for name, grad in wanted_grads.items():
        assert (grads[name] - grad).norm() <= 0.1 * grad.norm(), name


def test_public_names() -> None:
    assert {"accelerate", "explain", "restore"} <= set(gazelle.__all__)


def test_layers_of_one_model_may_keep_different_things() -> None:
    from gazelle.engine.keep import ALL, MLP

    model = adapt(make("llama", 25, num_hidden_layers=3))
    other = twin(model)
    accelerate(model)
    for layer, keep in zip(swapped_layers(model), (ALL, MLP), strict=False):
        layer.gazelle.keep = keep
    assert_same_step(model, other)


def test_rows_of_one_batch_after_another() -> None:
    """What one batch left behind has no part in the next."""
    model = adapt(make("mistral", 26))
    other = twin(model)
    accelerate(model)
    for number, length in enumerate((9, 4, 12)):
        text = rows(number, (length,))
        batch = {"input_ids": text[0][None], "labels": packed(text)["labels"]}
        for each in (model, other):
            each(**batch).loss.backward()
    ours, theirs = gradients(model), gradients(other)
    assert all((ours[name] - grad).norm() <= 1e-5 * grad.norm() for name, grad in theirs.items())


@pytest.mark.parametrize("given", ["HuggingFaceTB/SmolLM2-135M", nn.Linear(2, 2), None], ids=["name", "module", "none"])
@pytest.mark.parametrize("call", [accelerate, explain, restore])
def test_only_models_of_hugging_face_are_taken(call: Any, given: Any) -> None:
    with pytest.raises(ModelError, match="no Hugging Face model") as caught:
        call(given)
    assert call.__name__ in caught.value.where and "from_pretrained" in caught.value.fix
