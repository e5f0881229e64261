"""Steps in fixed shapes, as CUDA graphs need them, give the tokens of steps in any shape."""

import pytest
import torch
from peft import LoraConfig
from tests.generate.conftest import drive
from tests.models.families import FAMILIES, adapt, make

from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling


def answers(model, letters, rows, adapters=(None,), **options):
    with Batcher(model, letters, page_size=4, **options) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=9 + number % 4), adapters[number % len(adapters)])
                    for number, row in enumerate(rows)]
        drive(batcher)
    return [request.tokens for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, letters, prompts):
    model = make(family, 3).eval()
    model.generation_config.eos_token_id = None
    rows = prompts(1, 5, 17, 33, 6)
    assert answers(model, letters, rows, static=True) == answers(model, letters, rows, static=False)


def mixed():
    model = adapt(make("llama", 3)).eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model


def test_adapters_mixed(letters, prompts):
    model = mixed()
    rows = prompts(4, 5, 6, 7, 8, 9)
    asked = (None, "other", "__base__")
    want = answers(model, letters, rows, asked, static=False)
    assert answers(model, letters, rows, asked, static=True) == want
    assert len({tuple(row) for row in want}) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_on_a_gpu(letters, prompts):
    model = mixed().to("cuda")
    rows = prompts(4, 5, 6, 7, 8, 9)
    asked = (None, "other", "__base__")
    with Batcher(model, letters, page_size=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=20), asked[number % 3])
                    for number, row in enumerate(rows)]
        drive(batcher)
        shapes = batcher.runner.static._shapes
        assert shapes and all(shape.recorded is not None for shape in shapes.values())
    with Batcher(model, letters, page_size=4, static=False) as batcher:
        again = [batcher.submit(row, Sampling(max_new_tokens=20), asked[number % 3])
                 for number, row in enumerate(rows)]
        drive(batcher)
    assert [request.tokens for request in requests] == [request.tokens for request in again]


def test_prompts_of_a_token_a_step(letters, prompts):
    """Pieces of a prompt of one token look like answers, but nothing is to be chosen after them."""
    model = mixed()
    rows = prompts(7, 3, 9)
    want = answers(model, letters, rows, static=False)
    assert answers(model, letters, rows, static=True, step_tokens=1) == want
