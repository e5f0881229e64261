"""Options of sampling do what transformers' own do."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gazelle.generate.options import Sampling
from gazelle.generate.sample import Chooser, choose_all, narrowed


def reference(logits, sampling):
    ids = torch.tensor([[0]])
    row = TemperatureLogitsWarper(sampling.temperature)(ids, logits[None])
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(ids, row)
    if sampling.top_p < 1:
        row = TopPLogitsWarper(sampling.top_p)(ids, row)
    if sampling.min_p:
        row = MinPLogitsWarper(sampling.min_p)(ids, row)
    return row[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8},
                                     {"top_p": 1e-6}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_narrowing(options, temperature):
    sampling = Sampling(temperature=temperature, **options)
    for seed in range(5):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2
        torch.testing.assert_close(narrowed(logits, sampling), reference(logits, sampling))


def test_repetition_penalty():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    prompt, answer = [3, 4, 4], [7]
    got = Chooser(Sampling(repetition_penalty=1.3), prompt)._penalised(logits, answer)
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits[None].clone())[0]
    torch.testing.assert_close(got, want)


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.zeros(6)
    got = Chooser(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1])._penalised(logits, [2, 3, 3])
    assert got.tolist() == [0, 0, -0.75, -1.0, 0, 0]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    chooser = Chooser(Sampling(temperature=1.0, seed=0), [])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[chooser.choose(logits, [])] += 1
    torch.testing.assert_close(counts / 4000, logits.softmax(-1), rtol=0, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 1e-38, 1.1e-5])
def test_next_to_no_temperature_takes_the_likeliest(temperature):
    """And makes no infinity, which would end all requests of the step."""
    logits = torch.tensor([3.0, 88.0, -5.0])
    assert Chooser(Sampling(temperature=temperature), [0]).choose(logits, []) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_end_their_row_alone(value):
    logits = torch.tensor([[1.0, 2.0, 0.0], [value] * 3])
    choosers = [Chooser(Sampling(temperature=1, seed=0), [0]), Chooser(Sampling(temperature=1, seed=0), [0])]
    fine, broken = choose_all(logits, choosers, [[], []])
    assert fine.token is not None and broken.token is None and broken.error is not None
