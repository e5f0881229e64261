"""The guard in the server: what is asked is refused or masked, and of an answer nothing leaves that may not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Reference, Running

from gazelle.base.errors import OptionError
from gazelle.serve.loading import load_guard


@pytest.fixture(scope="module")
def said(reference: Reference) -> str:
    """What the model answers to everything, as far as the tests go: a piece in the middle of it is forbidden below."""
    return reference.text(reference.answer("base", reference.ids([{"role": "user", "content": "hello"}]), 60))


@pytest.fixture(scope="module")
def guarded(start: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory, said: str) -> Running:
    path = tmp_path_factory.mktemp("guard") / "guard.yaml"
    escaped = "".join(f"\\x{{{ord(letter):x}}}" for letter in said[30:36])
    path.write_text(json.dumps({"block_patterns": ["(?i)open sesame", escaped], "pii": "mask"}))
    return start(guard=load_guard(path))


def test_a_blocked_question_is_refused(guarded: Running, reference: Reference) -> None:
    for body, where in (({"messages": [{"role": "user", "content": "please: OPEN SESAME"}]}, "chat/completions"),
                        ({"prompt": ["hello", "open sesame"]}, "completions"),
                        ({"prompt": reference.tokenizer("open sesame")["input_ids"]}, "completions")):
        answer = httpx.post(f"{guarded.url}/v1/{where}", json={"model": "base", "max_tokens": 2} | body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "content_filter"
        assert "sesame" not in answer.text
    assert 'gazelle_guard_verdicts_total{direction="input",verdict="blocked"}' in guarded.metrics()


def test_what_is_masked_does_not_reach_the_model(guarded: Running, reference: Reference) -> None:
    answer = httpx.post(f"{guarded.url}/v1/completions", json={
        "model": "base", "prompt": "write to anna.petrova@brightmail.de now", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(reference.tokenizer("write to [EMAIL] now")["input_ids"])


def test_nothing_blocked_leaves_in_an_answer(guarded: Running, said: str) -> None:
    ask: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "temperature": 0,
                           "max_tokens": 60}
    forbidden = said[30:36]
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none") as client:
        choice = client.chat.completions.create(**ask).choices[0]
        assert choice.finish_reason == "content_filter"
        assert forbidden not in choice.message.content and "withheld" in choice.message.content
        chunks = list(client.chat.completions.create(**ask, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        assert forbidden not in streamed and "withheld" in streamed
        short = client.chat.completions.create(**ask | {"max_tokens": 3})
        assert short.choices[0].finish_reason == "length" and said.startswith(short.choices[0].message.content)
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            client.chat.completions.create(**ask, logprobs=True)
    assert 'gazelle_guard_verdicts_total{direction="output",verdict="blocked"} 2.0' in guarded.metrics()


def test_a_wrong_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        load_guard(tmp_path / "missing.yaml")
    (tmp_path / "guard.yaml").write_text("block_pattern: [x]\n")
    with pytest.raises(OptionError, match="block_pattern"):
        load_guard(tmp_path / "guard.yaml")
