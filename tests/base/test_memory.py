"""Memory that a block takes."""

import sys

import pytest
import torch

from gazelle.base.memory import memory_growth


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_is_freed_within_a_block_counts_at_its_peak() -> None:
    with memory_growth("cpu") as nothing:
        pass
    with memory_growth("cpu") as growth:
        block = torch.ones(50_000_000)
        del block
        kept = torch.ones(1000)
    assert nothing.bytes is not None and nothing.bytes < 20e6
    assert growth.bytes is not None and 190e6 < growth.bytes < 260e6
    assert growth.peak is not None and growth.before is not None and growth.peak == growth.before + growth.bytes
    assert kept.sum() == 1000


def test_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gazelle.base.memory._forget_peak", lambda: False)
    with memory_growth("cpu") as growth:
        pass
    assert growth.bytes is growth.before is growth.peak is None
