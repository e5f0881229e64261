"""The fused head's losses against Hugging Face's, however labels come."""

from typing import Any

import pytest
import torch
from tests.models.families import adapt, make, rows, twin
from torch import Tensor, nn

from gazelle import accelerate
from gazelle.models.head import Labelled, has_fused_head, logits_of
from gazelle.models.swap import restore

pytestmark = pytest.mark.usefixtures("one_thread")
# Families whose logits are scaled, capped, or neither.
FAMILIES = ["llama", "granite", "gemma2"]


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.stack(rows(0, (9, 9)))
    labels = ids.clone()
    labels[0, :4] = labels[1, ::2] = -100
    return ids, labels


def both(family: str, **options: Any) -> tuple[Any, Any]:
    """Losses of an accelerated model and of its twin, from one call each."""
    model = make(family, 1, tied=False)
    other = twin(model)
    return accelerate(model)(use_cache=False, **options), other(use_cache=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [None, 7, torch.tensor(13)])
def test_labels(family: str, count: Any) -> None:
    ids, labels = batch()
    options = {} if count is None else {"num_items_in_batch": count}
    ours, theirs = both(family, input_ids=ids, labels=labels, **options)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_shifted_already(family: str) -> None:
    ids, labels = batch()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    ours, theirs = both(family, input_ids=ids, labels=labels, shift_labels=shifted)
    torch.testing.assert_close(ours.loss, theirs.loss)
    only, _ = both(family, input_ids=ids, shift_labels=shifted)
    assert torch.equal(only.loss, ours.loss)


def test_nothing_learnt() -> None:
    ids, labels = batch()
    ours, theirs = both("llama", input_ids=ids, labels=torch.full_like(labels, -100), num_items_in_batch=3)
    assert ours.loss.item() == theirs.loss.item() == 0
    ours.loss.backward()
    ours, theirs = both("llama", input_ids=ids, labels=torch.full_like(labels, -100))
    assert ours.loss.isnan() and theirs.loss.isnan()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sums_over_chosen_positions(family: str, smoothing: float) -> None:
    ids, _ = batch()
    model = make(family, 2)
    other = twin(model)
    positions, targets = torch.tensor([0, 3, 12]), torch.tensor([5, -100, 7])
    loss = accelerate(model)(input_ids=ids, gazelle_labelled=Labelled(positions, targets, smoothing),
                             use_cache=False).loss
    logits = other(input_ids=ids, use_cache=False).logits.flatten(0, 1)[positions]
    want = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, want)


def test_evaluation_and_other_calls_have_logits() -> None:
    ids, labels = batch()
    model = make("llama", 3)
    other = twin(model)
    accelerate(model)
    for each in (model, other):
        each.eval()
    ours, theirs = (each(input_ids=ids, labels=labels, use_cache=False) for each in (model, other))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for each in (model, other):
        each.train()
    for options in ({"return_dict": False, "labels": labels}, {"logits_to_keep": 2}, {}):
        ours, theirs = (each(input_ids=ids, use_cache=False, **options) for each in (model, other))
        for a, b in zip(ours if isinstance(ours, tuple) else [ours.logits],
                        theirs if isinstance(theirs, tuple) else [theirs.logits], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hidden_states_come_with_the_loss() -> None:
    ids, labels = batch()
    ours, theirs = both("llama", input_ids=ids, labels=labels, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Wrapper(nn.Module):
    """As distributed training wraps models."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_fused_heads_are_found_in_wrappers() -> None:
    model = adapt(make("llama", 4))
    assert not has_fused_head(model)
    accelerate(model)
    assert has_fused_head(model) and has_fused_head(model.get_base_model()) and has_fused_head(Wrapper(model))
    model.get_base_model().lm_head = nn.Sequential(model.get_base_model().lm_head)
    assert not has_fused_head(model)
    restore(model)
    assert not has_fused_head(model)


@pytest.mark.parametrize(("family", "wanted"), [("llama", (1.0, None)), ("granite", (0.5, None)),
                                                ("gemma2", (1.0, 2.0))])
def test_what_is_done_to_logits(family: str, wanted: tuple[float, float | None]) -> None:
    assert logits_of(make(family, 5)) == wanted
