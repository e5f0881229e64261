"""`gazelle serve` as it is run: a process that answers, drains and ends."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Process, Reference, eventually

from gazelle.__main__ import main
from gazelle.serve.keys import add_key

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """red served as what training wrote, blue beside it, with a key."""
    key = add_key(tmp_path / "keys.json", "alice")
    running = Process(str(folder / "red"), "--adapter", f"sky={folder / 'blue'}", "--api-keys",
                      str(tmp_path / "keys.json"), "--temperature", "0", "--max-running", "4", "--max-queue", "2",
                      "--max-body", "200kB")
    try:
        yield running, key
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.end()


def test_a_server_from_its_first_answer_to_its_last(process: tuple[Process, str], reference: Reference) -> None:
    running, key = process
    ids = reference.ids(QUESTION)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["red", "base", "sky"]
        for name, of in (("red", "red"), ("sky", "blue"), ("base", "base")):  # greedy, as --temperature 0 says
            answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=8)
            assert answer.choices[0].message.content == reference.text(reference.answer(of, ids, 8)), name
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="red", prompt=["a"] * 7)
        with pytest.raises(openai.APIStatusError) as large:
            client.completions.create(model="red", prompt="a" * 300_000)
        assert large.value.status_code == 413

        # SIGTERM while an answer is being streamed: it comes to its end, nobody else is let in, exit code 0.
        stream = client.completions.create(model="red", prompt="a", max_tokens=400, stream=True)
        first = next(iter(stream))
        rest: list[Any] = []
        reader = threading.Thread(target=lambda: rest.extend(stream))
        reader.start()
        running.process.send_signal(signal.SIGTERM)
        reader.join(30)
        expected = reference.answer("red", reference.tokenizer("a")["input_ids"], 400)
        assert "".join(chunk.choices[0].text for chunk in [first, *rest]) == reference.text(expected)
    assert running.end() == 0
    assert any("Shutting down" in line for line in running.lines)
    assert not any("Traceback" in line for line in running.lines), running.lines
    assert not any(key in line for line in running.lines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_a_drain_that_takes_too_long_breaks_off(folder: Path) -> None:
    from gazelle.serve.loading import load_service
    from gazelle.serve.settings import Limits, Settings

    service = load_service(str(folder / "base"), {}, Settings(limits=Limits(drain_seconds=0.05)))
    try:
        import asyncio

        async def drained() -> None:
            service.drain(asyncio.get_running_loop())
            assert service.status == "draining"
            await asyncio.wait_for(service.ending.wait(), 5)

        asyncio.run(drained())
    finally:
        service.close()


def test_mistakes_are_told_before_a_model_is_loaded(folder: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, said in (
            (["nowhere", "--port", str(taken.getsockname()[1])], "cannot listen"),
            (["nowhere", "--adapter", "x"], "NAME=PATH"), (["nowhere", "--max-body", "big"], "size"), ([], "MODEL"),
            (["nowhere", "--api-keys", str(tmp_path / "no.json")], "no such file"),
            (["nowhere", "--guard", str(tmp_path / "no.yaml")], "no such file"),
        ):
            assert main(["serve", *arguments]) == 2
            assert said in capsys.readouterr().err, arguments
    for arguments, said in ((["./nowhere"], "there is no model"),
                            ([str(folder / "base"), "--adapter", f"base={folder / 'red'}"], "same name"),
                            ([str(folder / "base"), "--adapter", f"x={tmp_path}"], "adapter")):
        assert main(["serve", *arguments, "--port", "0"]) == 2
        assert said in capsys.readouterr().err, arguments


def test_a_fleet_is_vllms(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "mine"
    model.symlink_to(folder / "base")
    assert main(["serve", str(model), "--fleet"]) == 0
    printed = capsys.readouterr().out
    assert f"gazelle export {model} --to vllm" in printed and "gazelle_queue_answers" in printed
    assert main(["export", str(model), "--to", "vllm"]) == 0
    capsys.readouterr()
    assert main(["serve", str(model), "--fleet"]) == 0
    command = json.loads((tmp_path / "mine-vllm/vllm.json").read_text())["command"]
    assert capsys.readouterr().out.splitlines()[-1] == command


def test_eventually_gives_up() -> None:
    with pytest.raises(AssertionError, match="come to pass"):
        eventually(lambda: False, 0.1)
