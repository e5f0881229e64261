"""A model behind an address that speaks OpenAI's protocol: vLLM, llama-server, Ollama, gazelle's own server, a cloud's.

The protocol: https://platform.openai.com/docs/api-reference/chat
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx

from gazelle.base.errors import ModelError, OptionError, nearest, shorten
from gazelle.evaluate.answerers import Answerer, Reply
from gazelle.evaluate.cases import Case

_AGAIN = (429, 502, 503, 504)  # busy, or behind something that is
_TRIES = 6


class Endpoint(Answerer):
    """A model behind an address.

    Args:
        address: where the protocol begins, such as http://127.0.0.1:8000/v1, with the model's name behind a "#" if it
            is not named by `model`. Without a name the server has to have one model only.
        model: the model's name there.
        key_variable: the environment variable that holds the key. None sends no key: it goes only where it is asked to.
        concurrency: requests at a time, as long as they are not timed.
        timeout: seconds to wait for the next piece of an answer.

    Raises:
        OptionError: an address that is none, or the variable is not set.
    """

    def __init__(self, address: str, model: str | None = None, *, key_variable: str | None = None,
                 concurrency: int = 8, timeout: float = 120.0) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError("this is no address of a server", where="model", found=address,
                              expected="http://host:port/v1#model", fix="write the address up to /v1")
        if parts.username or parts.password:
            raise OptionError("an address with a password in it would be written into the report", where="model",
                              found=f"{parts.scheme}://…@{parts.hostname}", expected="an address without a password",
                              fix="put the key into an environment variable, and name that with --api-key-env")
        if parts.query:
            raise OptionError("an address with a query would be written into the report", where="model",
                              found=f"{parts.scheme}://{parts.hostname}…?…", expected="an address that ends before it",
                              fix="put a key into an environment variable, and name that with --api-key-env")
        self.address = parts._replace(fragment="").geturl().rstrip("/")
        self.model = model or parts.fragment
        self._key = _key_in(key_variable)
        self._concurrency, self._timeout = concurrency, timeout
        self._client: Any = None

    def check(self) -> None:
        self.open()
        try:
            self._client.get("/models")  # which not every server has: that something answers is enough
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            self.close()

    def open(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(base_url=self.address, headers=headers, timeout=self._timeout)
        try:
            if not self.model:
                self.model = self._only_model()
        except BaseException:
            self.close()
            raise
        self.runs_on = f"{self.model} at {self.address}"

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, cases: Sequence[Case], max_new_tokens: int, timed: Sequence[int] = ()) -> list[Reply]:
        replies: list[Reply] = [Reply("")] * len(cases)
        if timed:
            self._answer(cases[timed[0]], 2)
        for number in timed:
            replies[number] = self._answer(cases[number], max_new_tokens)
        rest = [number for number in range(len(cases)) if number not in set(timed)]
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                found = list(pool.map(lambda number: self._answer(cases[number], max_new_tokens), rest))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for number, reply in zip(rest, found, strict=True):
            replies[number] = Reply(reply.text)
        return replies

    def _answer(self, case: Case, max_new_tokens: int) -> Reply:
        body = {"model": self.model, "messages": case.messages, "max_tokens": max_new_tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}
        began, first, text, tokens, pieces = time.perf_counter(), None, "", None, 0
        for event in self._events(body):
            if usage := event.get("usage"):
                tokens = usage.get("completion_tokens")
            for choice in event.get("choices") or ():
                if piece := (choice.get("delta") or {}).get("content"):
                    first = first or time.perf_counter() - began
                    text, pieces = text + piece, pieces + 1
        seconds = time.perf_counter() - began
        return Reply(text, first or seconds, seconds, pieces if tokens is None else tokens)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
        for attempt in range(_TRIES):
            try:
                with self._client.stream("POST", "/chat/completions", json=body) as response:
                    if response.status_code in _AGAIN and attempt + 1 < _TRIES:
                        time.sleep(_wait(response, attempt))
                        continue
                    if response.status_code != 200:
                        response.read()
                        raise self._refused(response)
                    for line in response.iter_lines():
                        data = line.removeprefix("data:").strip()
                        if line.startswith("data:") and data != "[DONE]":
                            yield self._parsed(data)
                    return
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error

    def _parsed(self, data: str) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            raise self._strange(data) from error
        if not isinstance(event, dict):
            raise self._strange(data)
        if "error" in event:
            raise ModelError("the server gave up on an answer", where=self.address, expected="an answer",
                             found=self._hide(str(event["error"])), fix="look into the server's log")
        return event

    def _only_model(self) -> str:
        try:
            response = self._client.get("/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise self._refused(response)
        try:
            names = [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._strange(response.text) from error
        if len(names) != 1:
            raise ModelError("the server has not just one model", where=self.address,
                             found=", ".join(names) or "none", expected="the name of one",
                             fix=f"write {self.address}#NAME")
        return str(names[0])

    def _refused(self, response: httpx.Response) -> ModelError:
        fix = {401: "name the environment variable that holds the key with --api-key-env (key_variable= in Python)",
               403: "use another key", 404: "check the address, up to /v1, and the model's name behind the #",
               429: "wait, or ask fewer at a time"}.get(response.status_code, "look into the server's log")
        return ModelError("the server refuses", where=self.address,
                          found=self._hide(f"{response.status_code}: {response.text}"), expected="an answer", fix=fix)

    def _unreachable(self, error: httpx.HTTPError) -> ModelError:
        return ModelError("the server does not answer", where=self.address,
                          found=self._hide(f"{type(error).__name__}: {error}"), expected="a running server",
                          fix="start it, or check address and port")

    def _strange(self, text: str) -> ModelError:
        return ModelError("the server does not speak OpenAI's protocol", where=self.address, found=self._hide(text),
                          expected="JSON as of /chat/completions", fix="check the address, up to /v1")

    def _hide(self, text: str) -> str:
        """`text` without the key, which some servers repeat."""
        return shorten(text.replace(self._key, "…") if self._key else text)


def _key_in(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise OptionError("the environment variable with the key is not set", where="--api-key-env", found=variable,
                          expected="the name of a variable that holds a key",
                          fix=nearest(variable, [name for name in os.environ if name.endswith(("KEY", "TOKEN"))]
                                      or ["OPENAI_API_KEY"]))
    return key


def _wait(response: httpx.Response, attempt: int) -> float:
    """Seconds: what the server asks for, within a minute, or twice as long each time."""
    try:
        return min(60.0, max(0.0, float(response.headers.get("retry-after", ""))))
    except ValueError:
        return 0.5 * 2.0**attempt
