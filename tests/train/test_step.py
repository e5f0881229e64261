"""When steps that were recorded are recorded anew. What recording does is tested in tests/engine/test_graph.py."""

from typing import Any

import pytest
import torch
from tests.models.families import adapt, make, packed, rows

from gazelle import accelerate
from gazelle.train.step import GraphedStep

pytestmark = pytest.mark.usefixtures("one_thread")


def batch() -> dict[str, Any]:
    found = packed(rows())
    positions = (found["labels"][0] != -100).nonzero()[:, 0]
    return found | {"positions": positions - 1, "targets": found["labels"][0, positions], "uniform": False}


def test_steps_are_recorded_anew_where_weights_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(adapt(make("llama", 3)))
    step = GraphedStep(model, 0.0)
    cleared: list[int] = []
    monkeypatch.setattr(step.graph, "clear", lambda: cleared.append(1))
    monkeypatch.setattr("gazelle.engine.graph.WARM_UP", 100)  # there is no GPU to record on

    def answer() -> None:
        with torch.no_grad():
            model.eval()(input_ids=rows()[0][None], use_cache=False)
        model.train()

    for _ in range(2):
        step(batch(), 5)
        answer()  # evaluation leaves them where they are
    assert not cleared
    with model.disable_adapter():
        answer()  # without the adapters' columns
    step(batch(), 5)
    assert cleared == [1]
    step(batch(), 5)
    assert cleared == [1]
