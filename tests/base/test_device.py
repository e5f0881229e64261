"""Devices: what is asked for must be there."""

import pytest
import torch

from gazelle.base.device import check_device, default_device, default_dtype, device_name, memory_in_use, total_memory
from gazelle.base.errors import MissingDependencyError, OptionError
from gazelle.base.machine import machine_facts
from gazelle.base.optional import OPTIONAL, require, version


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:x", "gpu", "tpu:1", "cpu:1"])
def test_absent_devices_are_refused(device: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_device(device)
    assert caught.value.found == device
    assert caught.value.fix


def test_the_default_device_is_there() -> None:
    check_device(default_device())
    assert device_name(default_device())
    assert 1e6 < memory_in_use(default_device()) < total_memory(default_device()) or torch.cuda.is_available()


def test_facts_say_where_a_figure_comes_from() -> None:
    facts = machine_facts()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert len(facts["date"]) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's answer")
def test_a_cpu_computes_in_float32() -> None:
    assert default_dtype() == torch.float32


def test_an_absent_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONAL, "no_such_module", ("no-such", "dreams", "pip install no-such"))
    with pytest.raises(MissingDependencyError, match="no-such is not installed") as caught:
        require("no_such_module")
    assert caught.value.fix == "pip install no-such"
    assert version("no_such_module") is None
