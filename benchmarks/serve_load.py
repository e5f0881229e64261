"""Many clients at once on the demo model, one request in ten broken off: are answers right, does memory stay flat?

    python -m benchmarks.serve_load --out benchmarks/results/serve_load.json [--requests 10000]

Starts `gazelle serve` on the demo model in a process of its own. Each of the clients has questions that nobody else
asks; the right answers are those that transformers' `generate` gives to each question alone, greedily. Requests are
chats and completions, whole and streamed, by turns. Those that are broken off ask for a long stream and go after its
first piece, or before it. Memory is the server's resident memory: the median over the second tenth of the requests,
when caches are warm, against that over the last tenth.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from gazelle.base.files import write_text
from gazelle.base.machine import machine_facts
from gazelle.cli.demo import demo_model
from gazelle.models.load import load_model
from gazelle.models.special_tokens import stop_ids

CLIENTS, QUESTIONS, TOKENS, LONG = 32, 2, 4, 64
BROKEN_OFF = 10  # every so many-th request
RUNNING = 24  # at a time, so that some of the clients always wait
CONTEXT = 256  # tokens; a small cache is filled soon, and what grows afterwards is a leak
WORDS = ("heron", "anvil", "maple", "cobalt", "lantern", "otter", "saffron", "glacier", "thimble", "walnut", "harbour",
         "comet", "velvet", "badger", "marble", "tulip")


@dataclass(frozen=True)
class Question:
    """A prompt, as a chat or a text, and the right answer."""

    path: str
    body: dict[str, Any]
    answer: str


@dataclass
class Tally:
    """What came of all requests."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)


def questions() -> list[list[Question]]:
    """Those of each client. A client's number and word stand in its prompts, and so in many of its answers."""
    model, tokenizer = load_model(str(demo_model()), load_in_4bit=False, is_trainable=False)
    model.eval()
    found = []
    for client in range(CLIENTS):
        mine = []
        for number in range(QUESTIONS):
            word, code = WORDS[(client + 5 * number) % len(WORDS)], 100 + 31 * client + 7 * number
            text = f"{word} {code}, {word}"
            if number == 0:
                messages = [{"role": "user", "content": f"Repeat: {word} {code}"}]
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
                path, asked = "/v1/chat/completions", {"messages": messages}
            else:
                ids, path, asked = tokenizer(text)["input_ids"], "/v1/completions", {"prompt": text}
            answer = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                    do_sample=False, max_new_tokens=TOKENS,
                                    eos_token_id=stop_ids(model.generation_config))
            mine.append(Question(path, {"model": "demo", "temperature": 0, "max_tokens": TOKENS} | asked,
                                 tokenizer.decode(answer[0, len(ids):], skip_special_tokens=True)))
        found.append(mine)
    return found


def text_of(answer: dict[str, Any]) -> str:
    """What a whole answer, or a piece of a stream, says."""
    return "".join((choice.get("message") or choice.get("delta") or {}).get("content") or choice.get("text") or ""
                   for choice in answer["choices"])


async def ask(client: httpx.AsyncClient, question: Question, stream: bool, tally: Tally) -> None:
    """One request to its end."""
    began = time.perf_counter()
    if stream:
        said = ""
        async with client.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
            status = answer.status_code
            async for line in answer.aiter_lines():
                if status == 200 and line.startswith("data: {"):
                    piece = text_of(json.loads(line.removeprefix("data: ")))
                    if piece and not said:
                        tally.first.append(time.perf_counter() - began)
                    said += piece
    else:
        whole = await client.post(question.path, json=question.body)
        status = whole.status_code
        said = text_of(whole.json()) if status == 200 else ""
    if status != 200:
        tally.outcomes[f"status {status}"] += 1
        return
    tally.seconds.append(time.perf_counter() - began)
    right = said == question.answer
    tally.outcomes["right" if right else "wrong"] += 1
    if not right and len(tally.wrong) < 10:
        tally.wrong.append({"asked": json.dumps(question.body), "expected": question.answer, "got": said})


async def go_away(client: httpx.AsyncClient, question: Question, at_once: bool, tally: Tally) -> None:
    """Ask for a long stream, and break it off."""
    body = question.body | {"stream": True, "max_tokens": LONG}
    try:
        async with asyncio.timeout(0.05 if at_once else 60), client.stream("POST", question.path, json=body) as answer:
            async for _ in answer.aiter_bytes():
                break
    except TimeoutError:
        pass
    tally.outcomes["broken off"] += 1


async def load(url: str, process: psutil.Process, asked: list[list[Question]], requests: int) -> Tally:
    """All requests, shared among the clients as they have time."""
    tally, numbers = Tally(), iter(range(requests))
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)

    async def run(mine: list[Question]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            for number in numbers:
                question = mine[number % len(mine)]
                if number % BROKEN_OFF == BROKEN_OFF - 1:
                    await go_away(client, question, number % (2 * BROKEN_OFF) > BROKEN_OFF, tally)
                else:
                    await ask(client, question, number % 2 == 0, tally)
                tally.memory.append(process.memory_info().rss)
                if (number + 1) % max(1, requests // 10) == 0:
                    print(f"{number + 1:,} of {requests:,}: {dict(tally.outcomes)}", flush=True)

    await asyncio.gather(*(run(mine) for mine in asked))
    return tally


def measure(requests: int) -> dict[str, Any]:
    """Serve, ask, and sum up."""
    asked = questions()
    server = subprocess.Popen([sys.executable, "-m", "gazelle", "serve", str(demo_model()), "--name", "demo",
                               "--port", "0", "--max-running", str(RUNNING), "--max-context", str(CONTEXT)],
                              stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr or ())
        url = next(found[1] for line in lines if (found := re.search(r"(http://\S+)/v1", line)))
        threading.Thread(target=lambda: [sys.stderr.write(line) for line in lines], daemon=True).start()
        began = time.perf_counter()
        tally = asyncio.run(load(url, psutil.Process(server.pid), asked, requests))
        seconds = time.perf_counter() - began
        until = time.monotonic() + 30
        while "\ngazelle_running_answers 0.0\n" not in (metrics := httpx.get(f"{url}/metrics").text):
            assert time.monotonic() < until, "answers are still being written, though nobody waits for them"
            time.sleep(0.1)
        server.terminate()
        code = server.wait(60)
    finally:
        server.kill()
    tenth = max(1, len(tally.memory) // 10)
    warm, end = (statistics.median(part) for part in (tally.memory[tenth:2 * tenth], tally.memory[-tenth:]))
    ended = Counter({name: int(float(count)) for name, count in re.findall(
        r'^gazelle_answers_total\{finish="(\w+)",model="demo"\} (\S+)$', metrics, re.MULTILINE)})
    return {
        "machine": machine_facts(), "requests": requests, "clients": CLIENTS,
        "different_answers": len({question.answer for mine in asked for question in mine}),
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong, "requests_per_second": round(requests / seconds, 2), "seconds": round(seconds, 1),
        "request_seconds": quantiles(tally.seconds), "first_token_seconds": quantiles(tally.first),
        "answers_by_end": dict(ended), "exit_code": code,
        "memory_mb": {"warm": round(warm / 1e6, 1), "end": round(end / 1e6, 1),
                      "highest": round(max(tally.memory) / 1e6, 1), "growth": round(end / warm - 1, 4)},
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 4), "p90": round(cuts[89], 4), "p99": round(cuts[98], 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.requests)
    print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1))
    if arguments.out:
        write_text(arguments.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    outcomes = result["outcomes"]
    return int(bool(result["wrong"]) or set(outcomes) - {"right", "broken off"} != set())


if __name__ == "__main__":
    sys.exit(main())
