"""Answers held to a JSON schema are JSON that follows it, whatever the model would say."""

import json

import pytest
from tests.generate.conftest import drive

from gazelle.base.errors import OptionError
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling

SCHEMA = {"type": "object", "required": ["name", "age", "tags"], "additionalProperties": False, "properties": {
    "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 2}}}


@pytest.fixture(scope="module")
def batcher(_demo):
    with Batcher(*_demo, max_context=256) as batcher:
        yield batcher


def test_valid_json_greedy_and_drawn_beside_free_answers(batcher, demo_tokenizer):
    prompt = demo_tokenizer("Describe a person.")["input_ids"]
    held = [batcher.submit(prompt, Sampling(max_new_tokens=80, schema=SCHEMA, temperature=heat, seed=seed))
            for heat, seed in ((0.0, 0), (1.0, 1), (1.8, 2))]
    free = batcher.submit(prompt, Sampling(max_new_tokens=8))
    drive(batcher)
    for request in held:
        answer = json.loads(request.text)
        assert request.finish_reason == "stop"
        assert list(answer) == ["name", "age", "tags"] and len(answer["name"]) <= 8 and 0 <= answer["age"] <= 120
        assert 1 <= len(answer["tags"]) <= 2 and set(answer["tags"]) <= {"red", "blue"}
    alone = batcher.submit(prompt, Sampling(max_new_tokens=8))
    drive(batcher)
    assert free.tokens == alone.tokens


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "object", "properties": 3}])
def test_a_schema_that_is_none_is_refused_at_once(schema, batcher):
    with pytest.raises(OptionError) as caught:
        batcher.submit([1], Sampling(schema=schema))
    assert caught.value.where == "schema" and not batcher.busy
