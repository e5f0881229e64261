"""What strangers send. Every case is refused or waits by itself, and /health answers meanwhile."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from tests.serve.conftest import Running, eventually

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.serve.forms import ChatForm
from gazelle.serve.keys import add_key, read_keys
from gazelle.serve.server import listen
from gazelle.serve.settings import Limits, Settings, check_exposed

ASK = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def address(running: Running) -> tuple[str, int]:
    return "127.0.0.1", int(running.url.rpartition(":")[2])


@contextlib.contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(address(running), timeout=10) as connection:
        yield connection


def raw(running: Running, request: bytes) -> str:
    """What the server answers to bytes as they are; "" if it closes."""
    with connected(running) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
        return answer.decode("latin-1")


def healthy(running: Running) -> None:
    """Within a second; whoever else uses the machine may hold up one time, or two."""
    def once() -> bool:
        began = time.monotonic()
        assert httpx.get(f"{running.url}/health", timeout=5).json() == {"status": "ok"}
        return time.monotonic() - began < 1

    assert once() or once() or once()


@pytest.fixture(scope="module")
def small(start: Callable[..., Running]) -> Running:
    """Little room and little patience."""
    return start(body_bytes=20_000, receive_seconds=1.0, connections=40)


def test_only_its_own_names_reach_a_server(server: Running, start: Callable[..., Running]) -> None:
    for host, status in (("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:1", 200), ("LocalHost:3", 200),
                         ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:80", 421),
                         ("", 421), ("127.0.0.1@evil.example", 421), ("[::1].evil.example", 421),
                         ("localhost:80:80", 421)):
        answer = httpx.get(f"{server.url}/v1/models", headers={"host": host})
        assert answer.status_code == status, host
    named = start(allowed_hosts=("models.example",))
    assert httpx.get(f"{named.url}/health", headers={"host": "models.example"}).status_code == 200
    assert httpx.get(f"{named.url}/health", headers={"host": "evil.example"}).status_code == 421
    # Where it listens is a name of its own.
    for host, own in (("127.0.0.5", "127.0.0.5"), ("::1", "[::1]"), ("[::1]", "[::1]")):
        assert own in Settings(host=host).hosts and "evil.example" not in Settings(host=host).hosts
    elsewhere = start(host="127.0.0.5")
    url = elsewhere.url.replace("127.0.0.1", "127.0.0.5")
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("request_", [
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
     b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}"),
    b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"\x00" * 5000,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
], ids=range(12))
def test_crooked_requests_are_refused(request_: bytes, small: Running) -> None:
    answer = raw(small, request_)
    assert answer == "" or answer.split()[1].startswith("4"), answer
    healthy(small)


def test_a_web_page_cannot_ask_with_a_form(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}/v1/models", headers={
        "origin": "http://evil.example", "access-control-request-method": "POST"}).headers


def test_large_bodies_are_refused_while_they_come(small: Running) -> None:
    before = small.metrics()
    declared = httpx.post(f"{small.url}/v1/completions", content=b"x" * 100_000_000, timeout=30,
                          headers={"content-type": "application/json"})
    assert declared.status_code == 413 and declared.json()["error"]["code"] == "body_too_large"

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 100_000

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # it may close while we write
        chunked = httpx.post(f"{small.url}/v1/completions", content=endless(), timeout=30,
                             headers={"content-type": "application/json"})
        assert chunked.status_code == 413
    healthy(small)

    def memory(text: str) -> float:
        return next(float(line.split()[1]) for line in text.splitlines()
                    if line.startswith("gazelle_process_memory_bytes"))

    # The client's own 100 MB are in this process too; the server's copy would be a second one.
    assert memory(small.metrics()) - memory(before) < 160e6


def test_deep_and_strange_json(server: Running) -> None:
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b"", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b'{"model": NaN}',
                 b'{"model":"base","prompt":"a","seed":' + b"9" * 5000 + b"}",
                 b'{"model":"base","prompt":"a","temperature":1e999}', b'{"model":"base","prompt":"\\ud800"}',
                 b'{"model":"base","prompt":[4000000000]}', b'{"model":"base","prompt":[-1]}',
                 b'{"model":"base","prompt":[[],[1]]}', b'{"model":"base","prompt":[true]}'):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:40]


MISTAKES = [{"prompt": ["a", 1] * 120_000}, {"prompt": [None] * 150_000}, {"messages": [{}] * 200_000},
            {str(number): 1 for number in range(60_000)}]


def test_a_megabyte_of_mistakes_is_told_at_once(server: Running) -> None:
    """Whoever checks a request holds up all others: to list 500,000 mistakes would take four seconds."""
    with httpx.Client(base_url=server.url, headers={"content-type": "application/json"}, timeout=30) as client:
        for mistake in MISTAKES:
            path = "/v1/chat/completions" if "messages" in mistake else "/v1/completions"
            body = json.dumps({"model": "base", "prompt": "a"} | mistake).encode()
            began = time.process_time()  # of this process, which is client and server
            assert client.post(path, content=body).status_code == 400
            assert time.process_time() - began < 1.5


def test_clients_that_take_their_time_hold_nobody_up(small: Running) -> None:
    """More connections than there is room for, each sending its request byte by byte, or reading none of its answer."""
    async def slow(opening: bytes) -> None:
        reader, writer = await asyncio.open_connection(*address(small))
        with contextlib.suppress(ConnectionError):
            for at in range(len(opening)):
                writer.write(opening[at:at + 1])
                await writer.drain()
                await asyncio.sleep(0.25)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def attack() -> list[float]:
        headers = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body = headers + b"Content-Length: 1000\r\n\r\n" + b"{" * 200
        attackers = [asyncio.create_task(slow(headers if number % 2 else body[-220:])) for number in range(60)]
        health = []
        async with httpx.AsyncClient(timeout=10) as client:
            for _ in range(8):
                began = time.monotonic()
                assert (await client.get(f"{small.url}/health", headers={"connection": "close"})).status_code == 200
                assert (await client.post(f"{small.url}/v1/chat/completions", json=ASK,
                                          headers={"connection": "close"})).status_code == 200
                health.append(time.monotonic() - began)
                await asyncio.sleep(0.1)
        await asyncio.wait_for(asyncio.gather(*attackers), 60)
        return health

    health = asyncio.run(attack())
    assert median(health) < 1
    eventually(lambda: len(small.server.server_state.connections) == 0)


def test_a_body_that_stops_coming_is_given_up(small: Running) -> None:
    with connected(small) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1000) == b""
        assert 0.5 < time.monotonic() - began < 9


def test_a_client_that_never_reads_is_cut_off(start: Callable[..., Running]) -> None:
    running = start(receive_seconds=0.5)
    # Connections inherit it: the system's own buffers would hold the whole answer of a tiny model.
    running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = b'{"model":"base","prompt":"a","max_tokens":500,"temperature":0,"logprobs":20,"stream":true}'
    with connected(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
        eventually(lambda: 'gazelle_answers_total{finish="cancelled",model="base"} 1.0' in running.metrics())
        assert running.service._taken == 0
    healthy(running)


def test_endless_prompts_are_refused_while_others_are_answered(server: Running) -> None:
    async def both() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            long = [asyncio.create_task(client.post(f"{server.url}/v1/chat/completions", json=ASK | {
                "messages": [{"role": "user", "content": "ab " * 60_000}]})) for _ in range(4)]
            health = []
            while not all(task.done() for task in long):
                began = time.monotonic()
                assert (await client.get(f"{server.url}/health")).status_code == 200
                health.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
            assert median(health) < 1
            for task in long:
                assert (await task).json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(both())


def test_large_bodies_do_not_pile_up(start: Callable[..., Running]) -> None:
    """They wait for one another, and each is held meanwhile: as many as there are places, the others come again."""
    running = start(running=1, queue=1)

    async def ask() -> list[httpx.Response]:
        body = json.dumps({"model": "nobody", "prompt": "a" * 100_000}).encode()
        async with httpx.AsyncClient(timeout=60, headers={"content-type": "application/json"}) as client:
            while True:  # those that come one by one are all let in
                answers = await asyncio.gather(*(
                    client.post(f"{running.url}/v1/completions", content=body) for _ in range(20)))
                if {answer.status_code for answer in answers} != {404}:
                    return answers

    answers = asyncio.run(asyncio.wait_for(ask(), 60))
    assert {answer.status_code for answer in answers} == {404, 429}
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}
    assert running.server.config.app._large_waiting == 0


def test_an_answer_is_written_beside_the_loop(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest tokens of thousands it takes seconds, in which the loop would answer nobody."""
    writers = []
    whole = ChatForm.whole

    def noted(form: ChatForm, choices: Any) -> dict[str, Any]:
        writers.append(threading.current_thread().name)
        return whole(form, choices)

    monkeypatch.setattr(ChatForm, "whole", noted)
    answer = httpx.post(f"{start().url}/v1/chat/completions", json=ASK | {"logprobs": True, "top_logprobs": 20})
    assert len(answer.json()["choices"][0]["logprobs"]["content"]) == 2
    assert [name.startswith("prepare") for name in writers] == [True]


def test_keys(start: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "alice")
    running = start(keys=read_keys(path))

    def ask(authorization: str | None, where: str = "/v1/models") -> int:
        headers = {} if authorization is None else {"authorization": authorization}
        return httpx.get(running.url + where, headers=headers).status_code

    wrong = (None, "", "Bearer", f"Basic {key}", f"Bearer {key}x", f"Bearer {key[:-1]}", key,
             f"Bearer {key},{key}", "Bearer " + "x" * 10_000)
    for authorization in wrong:
        for where in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert ask(authorization, where) == 401
    assert ask(None, "/health") == 200
    assert ask(f"Bearer {key}") == 200 and ask(f"bearer  {key}") == 200
    # Whoever has no key is refused before the body is read.
    with connected(running) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 500000\r\n\r\n")
        assert b" 401 " in connection.recv(1000)
    twice = raw(running, f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
                         f"Authorization: Bearer nonsense\r\n\r\n".encode())
    assert twice.split()[1] == "400"
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=ASK,
                        headers={"authorization": f"Bearer {key}"}).json()
    other = add_key(path, "bob")
    assert httpx.post(f"{running.url}/v1/feedback", json={"id": answer["id"], "rating": "bad"},
                      headers={"authorization": f"Bearer {other}"}).status_code == 401  # the server knows alice alone
    text = httpx.get(f"{running.url}/metrics", headers={"authorization": f"Bearer {key}"}).text
    assert 'gazelle_key_tokens_total{key="alice",kind="answer"} 2.0' in text and key not in text


def test_other_machines_are_served_with_keys_alone(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "models.example"):
        with pytest.raises(OptionError, match="anybody in the network"):
            check_exposed(Settings(host=host), keys=False, allowed=False)
        check_exposed(Settings(host=host), keys=True, allowed=False)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_exposed(Settings(host=host), keys=False, allowed=False)
    assert main(["serve", str(folder / "base"), "--host", "0.0.0.0"]) == 2
    assert "serve-key" in capsys.readouterr().err


def test_of_two_servers_that_start_at_once_one_is_refused_before_it_loads() -> None:
    first = listen(Settings(port=0))
    try:
        with pytest.raises(OptionError, match="in use"):
            listen(Settings(port=first.getsockname()[1])).close()
    finally:
        first.close()
    with pytest.raises(OptionError, match="cannot listen"):
        listen(Settings(host="." + "x" * 70, port=0)).close()


def test_limits_are_above_zero() -> None:
    for name in ("running", "body_bytes", "seconds", "connections", "choices"):
        with pytest.raises(OptionError, match=name):
            Limits(**{name: 0})
