"""A model behind an address, asked over real HTTP."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gazelle.base.errors import ModelError, OptionError
from gazelle.evaluate.cases import read_cases
from gazelle.evaluate.endpoint import Endpoint
from gazelle.evaluate.pipeline import EvaluationPipeline

KEY = "sk-secret-1234"


class Server(ThreadingHTTPServer):
    """Answers with the question in capitals, a word a chunk. Has one model; wants the key if told so."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.models = ["echo"]
        self.busy = 0  # requests to send away first
        self.says: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def reply(self, status: int, text: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.reply(401, f"wrong key {self.headers.get('Authorization')}".encode())
        elif self.server.busy:
            self.server.busy -= 1
            self.reply(429, b"busy", {"Retry-After": "0"})
        elif body["model"] not in self.server.models:
            self.reply(404, b"no such model")
        elif self.server.says is not None:
            self.reply(200, self.server.says)
        else:
            words = body["messages"][-1]["content"].upper().split(" ")
            chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                      *({"choices": [{"delta": {"content": word if not at else f" {word}"}}]}
                        for at, word in enumerate(words)),
                      {"choices": [], "usage": {"completion_tokens": 7}}]
            self.reply(200, b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
                       + b": a comment\n\ndata: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


CASES = [{"input": f"tell me {number}", "expected": f"TELL ME {number}", "system": "Loud."} for number in range(12)]


def test_a_running_server_is_evaluated(server: Server) -> None:
    found = EvaluationPipeline(server.url, test_cases=CASES, metrics=["exact_match", "perplexity", "latency", "ttft",
                                                                      "tokens_per_second"],
                               timed_cases=3, max_new_tokens=9).run()
    result = found.results[0]
    assert result.scores["exact_match"] == [1] * 12
    assert result.runs_on == f"echo at {server.url}"
    assert result.overall["perplexity"] is None  # which the protocol does not tell
    assert [reply.tokens for reply in result.replies if reply.seconds] == [7] * 3
    timed = [(reply.first_token, reply.seconds) for reply in result.replies if reply.seconds and reply.first_token]
    assert len(timed) == 3 and all(0 < first <= seconds for first, seconds in timed)
    body = server.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Loud."}
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 9, "echo")
    assert server.keys == [None] * 13  # and one to warm up
    assert "| perplexity ↓ | – |" in found.to_markdown()


def test_the_key_comes_from_a_variable_and_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.key = KEY
    pipeline = EvaluationPipeline(Endpoint(f"{server.url}#echo", key_variable="MY_KEY"), test_cases=CASES,
                                  metrics=["exact_match"])
    found = pipeline.run()
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in found.to_json() + found.to_html() + found.to_markdown()
    server.key = "another"
    with pytest.raises(ModelError, match="refuses") as caught:
        pipeline.run()
    assert KEY not in str(caught.value) and "401" in caught.value.found
    assert "--api-key-env" in caught.value.fix


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.busy = 3
    endpoint = Endpoint(server.url, "echo")
    endpoint.open()
    assert endpoint.ask(read_cases(CASES[:1]), 4)[0].text == "TELL ME 0"
    endpoint.close()
    assert len(server.bodies) == 4


@pytest.mark.parametrize(("change", "said"), [
    ({"models": ["a", "b"]}, "not just one model"), ({"says": b"data: {oops\n\n"}, "OpenAI's protocol"),
    ({"says": b'data: {"error": "out of memory"}\n\n'}, "gave up"), ({"busy": 99}, "refuses"),
    ({"says": b"data: 3\n\n"}, "OpenAI's protocol"),
])
def test_what_servers_do_wrong(server: Server, change: dict[str, Any], said: str) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(ModelError) as caught:
        EvaluationPipeline(server.url, test_cases=CASES, metrics=["exact_match"]).run()
    assert said in str(caught.value) and server.url in caught.value.where


def test_an_unknown_model(server: Server) -> None:
    with pytest.raises(ModelError, match="refuses") as caught:
        EvaluationPipeline(f"{server.url}#other", test_cases=CASES, metrics=["exact_match"]).run()
    assert "404" in caught.value.found and "#" in caught.value.fix


def test_nobody_is_there() -> None:
    with pytest.raises(ModelError, match="does not answer"):
        EvaluationPipeline("http://127.0.0.1:9/v1#x", test_cases=CASES, metrics=["exact_match"]).run()


def test_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no address"):
        Endpoint("ftp://somewhere/v1")
    with pytest.raises(OptionError, match="password") as caught:
        Endpoint("https://me:hunter2@somewhere/v1")
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(OptionError, match="not set"):
        Endpoint("https://somewhere/v1", key_variable="NO_SUCH_KEY")
