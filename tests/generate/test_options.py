"""Options are checked when they are given, under vLLM's names too."""

from types import SimpleNamespace

import pytest

from gazelle.base.errors import OptionError
from gazelle.generate.options import Sampling, sampling_of


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0), ("logprobs", 21),
    ("seed", "x"), ("stop", ("",)), ("stop", ("a",) * 17), ("schema", "{"), ("schema", []), ("temperature", True),
    ("presence_penalty", 3), ("stop_token_ids", ("a",)), ("stop", 5), ("stop_token_ids", 2)])
def test_out_of_range(name, value):
    with pytest.raises(OptionError) as caught:
        Sampling(**{name: value})
    assert caught.value.where == name


def test_other_spellings():
    assert sampling_of({"max_tokens": 5, "stop": "x"}) == Sampling(max_new_tokens=5, stop=("x",))
    assert sampling_of(max_new_tokens=5, do_sample=False, temperature=0.7).temperature == 0
    params = SimpleNamespace(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=["a"], schema=print, n=1)
    assert sampling_of(params, top_k=4) == Sampling(7, 0.5, 0.9, 4, seed=3, stop=("a",))
    assert sampling_of(Sampling(max_new_tokens=3), temperature=1) == Sampling(max_new_tokens=3, temperature=1)


def test_a_name_that_is_none():
    with pytest.raises(OptionError, match="no such option") as caught:
        sampling_of(temprature=1)
    assert "temperature" in caught.value.fix


@pytest.mark.parametrize("params", [64, "greedy", SimpleNamespace(max_tokens=5, min_tokens=3),
                                    SimpleNamespace(max_tokens=5, logit_bias={3: 1.0})])
def test_what_would_not_be_heeded_is_refused(params):
    with pytest.raises(OptionError):
        sampling_of(params)
