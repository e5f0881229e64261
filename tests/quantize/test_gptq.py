"""GPTQ beside the textbook's update in float64, and beside plain rounding."""

import pytest
import torch

from gazelle.base.errors import ModelError
from gazelle.quantize.awq import input_scales, output_error
from gazelle.quantize.gptq import gptq
from gazelle.quantize.groups import Grid, Steps, fit, nearest, rounded

N, K, GROUP = 24, 192, 32


def case(seed=0, tokens=400):
    """A weight, inputs of very different sizes that hang together, and their Gram matrix, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64) / K**0.5
    sizes = torch.exp(1.5 * torch.randn(K, generator=generator, dtype=torch.float64))
    inputs = torch.randn(tokens, K, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(K)) * sizes
    return weight, inputs, inputs.T @ inputs


def textbook(weight, gram, grid, act_order):
    """The optimal brain quantiser's update, column by column, with the inverse Hessian shrunk by elimination."""
    gram = gram.clone()
    importance = gram.diagonal().clone()
    order = importance.argsort(descending=True, stable=True) if act_order else torch.arange(K)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.linalg.inv(gram)
    weight, numbers, fixed = weight.clone(), torch.zeros_like(weight), fit(weight, grid, importance)
    done = torch.zeros(K, dtype=torch.bool)
    for column in order.tolist():
        group = column // GROUP
        if not act_order and column % GROUP == 0:
            part = slice(column, column + GROUP)
            now = fit(weight[:, part], grid, importance[part])
            fixed.step[:, group], fixed.zero[:, group] = now.step[:, 0], now.zero[:, 0]
        number = nearest(weight[:, column], fixed.step[:, group], fixed.zero[:, group])
        numbers[:, column] = number
        error = (weight[:, column] - number) / inverse[column, column]
        done[column] = True
        weight -= torch.outer(error, inverse[column]) * ~done
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return numbers, fixed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_numbers_are_the_textbooks(act_order, symmetric):
    weight, _, gram = case()
    grid = Grid(GROUP, symmetric, torch.float16)
    numbers, steps = gptq(weight, gram, grid, act_order=act_order)
    want, want_steps = textbook(weight, gram, grid, act_order)
    assert torch.equal(steps.step, want_steps.step) and torch.equal(steps.zero, want_steps.zero)
    assert torch.equal(numbers, want)
    assert torch.equal(rounded(numbers, steps, grid), numbers)  # every number is one that the steps allow


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_outputs_change_less_than_by_rounding(seed):
    weight, inputs, gram = case(seed)
    grid = Grid(GROUP, True, torch.float16)
    plain = rounded(weight, fit(weight, grid), grid)
    shrunk = rounded(weight, fit(weight, grid, gram.diagonal()), grid)
    errors = [float(((numbers - weight) @ inputs.T).square().sum()) for numbers in (
        plain, shrunk, gptq(weight, gram, grid, act_order=False)[0], gptq(weight, gram, grid, act_order=True)[0])]
    assert output_error(plain - weight, gram) == pytest.approx(errors[0], rel=1e-9)
    assert errors[1] < errors[0]
    assert errors[2] < 0.85 * errors[1]
    assert errors[3] < 0.75 * errors[1]


def test_in_float32_it_is_nearly_as_good():
    weight, _, gram = case(4)
    grid = Grid(GROUP, True, torch.bfloat16)
    exact, rough = (output_error(gptq(weight.to(dtype), gram.to(dtype), grid)[0].double() - weight, gram)
                    for dtype in (torch.float64, torch.float32))
    assert rough < 1.05 * exact


def test_inputs_that_were_never_seen_are_rounded_to_the_nearest():
    weight, inputs, _ = case(5)
    inputs[:, 32:64] = 0
    grid = Grid(GROUP, True, torch.float16)
    numbers, steps = gptq(weight, inputs.T @ inputs, grid)
    part = Steps(steps.step[:, 1:2], steps.zero[:, 1:2])
    assert torch.equal(numbers[:, 32:64], rounded(weight[:, 32:64], part, grid))
    assert torch.equal(gptq(weight, torch.zeros(K, K, dtype=torch.float64), grid)[0],
                       rounded(weight, fit(weight, grid, torch.ones(K, dtype=torch.float64)), grid))


def test_inputs_that_are_no_numbers_are_an_error():
    weight, _, gram = case()
    gram[3, 5] = gram[5, 3] = torch.nan
    with pytest.raises(ModelError, match="cannot be calibrated with"):
        gptq(weight, gram, Grid(GROUP, True, torch.float16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_to_the_nearest(symmetric):
    """Beside all sixteen numbers that a group's step allows, tried one after the other."""
    weight, _, gram = case(6)
    grid = Grid(GROUP, symmetric, torch.float16)
    for steps in (fit(weight, grid), fit(weight, grid, gram.diagonal())):
        numbers = rounded(weight, steps, grid)
        allowed = ((torch.arange(-8, 8)[:, None, None] - steps.zero).half() * steps.step).double()
        distance = (weight.unflatten(1, (-1, GROUP)) - allowed[..., None]).abs().amin(0)
        found = (weight - numbers).abs().unflatten(1, (-1, GROUP))
        assert (found <= distance + 2e-3 * steps.step[..., None]).all()
    assert (weight - rounded(weight, fit(weight, grid), grid)).abs().max() < 0.51 * fit(weight, grid).step.max()


def test_scaling_inputs_lowers_the_error():
    weight, inputs, gram = case(7)
    grid = Grid(GROUP, False, torch.float16)
    scales = input_scales(weight, gram, inputs.abs().mean(0), grid)
    scaled = weight * scales
    after = rounded(scaled, fit(scaled, grid), grid) / scales - weight
    before = rounded(weight, fit(weight, grid), grid) - weight
    assert output_error(after, gram) < 0.7 * output_error(before, gram)
    # Inputs of one size leave nothing to win.
    even = torch.randn(4000, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    again = input_scales(weight, even.T @ even, torch.ones(K, dtype=torch.float64), grid)
    assert torch.equal(again, torch.ones(K, dtype=torch.float64))
