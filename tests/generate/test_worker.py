"""The thread answers, outlives errors of steps and of listeners, drains and stops."""

import asyncio
import queue
import threading

import pytest
from tests.models.families import make

from gazelle.base.errors import OptionError
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling
from gazelle.generate.worker import Worker, WorkerStoppedError


@pytest.fixture
def worker(letters):
    model = make("llama", 3).eval()
    model.generation_config.eos_token_id = None
    with Batcher(model, letters, max_running=4) as batcher:
        worker = Worker(batcher).start()
        yield worker
        worker.stop(timeout=10)
        assert not worker.alive


def test_many_threads_get_their_own_answers(worker, alone, prompts):
    rows = prompts(*range(2, 22))
    model, got = worker.batcher.runner.inner, {}

    def ask(number):
        got[number] = [token for event in worker.stream(rows[number], Sampling(max_new_tokens=6))
                       for token in event.tokens]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [got[number] for number in range(20)] == [alone(model, row, 6) for row in rows]


def test_from_asyncio(worker):
    async def ask():
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        worker.submit([3, 4], Sampling(max_new_tokens=5),
                      deliver=lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        got = [await events.get()]
        while got[-1].finish_reason is None:
            got.append(await events.get())
        return got

    got = asyncio.run(asyncio.wait_for(ask(), 10))
    assert sum(len(event.tokens) for event in got) == 5 and got[-1].finish_reason == "length"


def test_an_error_in_a_step_ends_its_requests_and_nothing_else(worker, monkeypatch, alone):
    run, model = worker.batcher.runner.run, worker.batcher.runner.inner

    def fail(rows):
        monkeypatch.setattr(worker.batcher.runner, "run", run)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(worker.batcher.runner, "run", fail)
    event = list(worker.stream([3, 4], Sampling(max_new_tokens=5)))[-1]
    assert event.finish_reason == "error" and "out of luck" in str(event.error)
    answer = [token for event in worker.stream([3, 4], Sampling(max_new_tokens=5)) for token in event.tokens]
    assert answer == alone(model, [3, 4], 5)
    assert worker.failures == 1 and worker.batcher.cached_tokens == 0


def test_who_was_cancelled_just_then_is_told_too(worker, monkeypatch):
    run, told, asked = worker.batcher.runner.run, [], threading.Event()

    def fail(rows):
        if not second.cancelled:
            asked.set()
            return run(rows)
        monkeypatch.setattr(worker.batcher.runner, "run", run)
        raise RuntimeError("out of luck")

    second = worker.submit([5], Sampling(max_new_tokens=100), deliver=told.append)
    monkeypatch.setattr(worker.batcher.runner, "run", fail)
    worker.submit([3, 4], Sampling(max_new_tokens=100), deliver=told.append)
    assert asked.wait(10)
    worker.cancel(second)
    assert worker.drain(10)
    assert [event.finish_reason for event in told if event.finish_reason] == ["cancelled", "error"]


def test_a_listener_that_fails_is_cancelled(worker):
    called = threading.Event()

    def deliver(event):
        called.set()
        raise RuntimeError("nobody is here")

    request = worker.submit([3, 4], Sampling(max_new_tokens=100), deliver=deliver)
    assert called.wait(10)
    assert list(worker.stream([5], Sampling(max_new_tokens=3)))[-1].finish_reason == "length"
    assert worker.drain(10) and request.finish_reason == "cancelled"


def test_leaving_a_stream_cancels(worker):
    events = worker.stream([3, 4], Sampling(max_new_tokens=120))
    request = next(events).request
    events.close()
    assert worker.drain(10) and request.finish_reason == "cancelled" and len(request.tokens) < 120


def test_draining_answers_what_is_there_and_takes_no_more(worker):
    done = []
    for _ in range(6):
        worker.submit([3, 4], Sampling(max_new_tokens=20), deliver=done.append)
    assert worker.drain(20)
    assert sum(event.finish_reason == "length" for event in done) == 6
    with pytest.raises(WorkerStoppedError):
        worker.submit([3], Sampling(max_new_tokens=3), deliver=done.append)


def test_mistakes_are_raised_where_they_are_made(worker):
    with pytest.raises(OptionError):
        worker.stream([], Sampling())


def test_whoever_waits_is_told_when_the_thread_ends(worker, monkeypatch):
    """Nothing is known to end it; should it happen, nobody waits for an answer that never comes."""
    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(worker.batcher, "step", fail)
    monkeypatch.setattr(worker.batcher, "abort", fail)
    told = [queue.SimpleQueue() for _ in range(3)]
    with worker._wake:
        for events in told:
            worker.submit([3, 4], Sampling(max_new_tokens=5), deliver=events.put)
    for events in told:
        event = events.get(timeout=10)
        assert event.finish_reason == "error" and "on purpose" in str(event.error)
    worker._thread.join(10)
    assert not worker.alive
    with pytest.raises(WorkerStoppedError):
        worker.submit([3, 4], Sampling(max_new_tokens=5), deliver=told[0].put)
