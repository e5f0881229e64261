"""Continuous batching: requests join and leave between two steps, and share one paged cache."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from gazelle.adapters.mixed import MixedAdapters
from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.base.log import say_once
from gazelle.generate.grammar import Grammars
from gazelle.generate.options import Sampling
from gazelle.generate.paged import PagedCache
from gazelle.generate.pages import Pages
from gazelle.generate.request import Event, Request
from gazelle.generate.room import pages_for
from gazelle.generate.rows import Row
from gazelle.generate.runner import PagedRunner, PlainRunner, Runner
from gazelle.generate.sample import Chooser, Logprob, choose_all
from gazelle.generate.text import Pieces
from gazelle.models.context import context_limit
from gazelle.models.generate import end_tokens
from gazelle.models.packed import supports_packing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_open: "WeakKeyDictionary[Any, ref[Batcher]]" = WeakKeyDictionary()  # model -> who has its layers now


class Batcher:
    """Generates many answers at a time, one token of each a step.

    `prepare`, `enqueue`, `submit` and `cancel` may be called from any thread, everything else from one. The model is in
    evaluation mode, and its layers carry the adapters, until `close`.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        adapters: folders with LoRA adapters, by the names that requests ask for them.
        max_running: requests at a time; others wait.
        max_context: tokens that a prompt and its answer may have; None for the model's own limit.
        cache_tokens: tokens that the cache has room for; None for all that can run, or half of the free memory. A CPU's
            memory is taken as pages are first used, and kept.
        page_size: tokens of a page.
        step_tokens: tokens of prompts that a step takes, so that running answers need not wait for long ones.
        share_prefixes: whether prompts that begin alike, under the same adapter, share that part of the cache.
        static: whether steps without a prompt run in fixed shapes, as CUDA graphs need; None for on a GPU.

    Raises:
        ModelError: an adapter cannot be used, or there is no memory for one request.
        OptionError: a number out of range, or the model is answering for another batcher that is still open.
    """

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", *,
                 adapters: Mapping[str, str | PathLike[str]] | None = None, max_running: int = 16,
                 max_context: int | None = None, cache_tokens: int | None = None, page_size: int = 16,
                 step_tokens: int = 512, share_prefixes: bool = True, static: bool | None = None) -> None:
        for name, value in (("max_running", max_running), ("max_context", max_context), ("page_size", page_size),
                            ("cache_tokens", cache_tokens), ("step_tokens", step_tokens)):
            if value is not None and value < 1:
                raise OptionError("a value out of range", where=name, found=value, expected="at least 1",
                                  fix=f"change {name}")
        inner = unwrap(model)
        if inner in _open and _open[inner]() is not None:
            # Either would put back what the other still needs: the mode, and the layers' adapters.
            raise OptionError("the model is answering elsewhere", where="model", found="a batcher or stream not closed",
                              expected="one at a time", fix="read the stream to its end, or close() it")
        limit = context_limit(inner.config.get_text_config())
        self.max_context = min(max_context or limit or 1 << 20, limit or 1 << 20)
        self.max_running, self.step_tokens = max_running, step_tokens
        self.tokenizer = tokenizer
        self.ends = frozenset(end_tokens(inner, tokenizer))
        self.vocabulary = inner.get_output_embeddings().weight.shape[0]
        reason = supports_packing(inner)
        count = pages_for(inner, max_running * self.max_context if cache_tokens is None else cache_tokens, page_size,
                          exact=cache_tokens is not None)
        self.pages = Pages(count, page_size, share=share_prefixes and not reason)
        self.adapters = MixedAdapters(model, adapters)
        self._modes = [(module, module.training) for module in inner.modules()]
        inner.eval()
        self.runner: Runner
        if reason:
            say_once(f"answers are computed one by one, without a paged cache: {reason}")
            self.runner = PlainRunner(model, self.adapters)
            self._kind: Callable[[int], Hashable] = lambda _: None
        else:
            on_gpu = inner.get_input_embeddings().weight.device.type == "cuda"
            self.runner = PagedRunner(model, self.adapters, PagedCache(count, page_size),
                                      static=on_gpu if static is None else static)
            self._kind = self.runner.rotary
        self._whole = bool(reason) or self._kind(1) != self._kind(1 << 30)  # prompts are computed in one piece
        self._grammars = Grammars(tokenizer, self.vocabulary, tuple(sorted(self.ends)))
        self._lock = threading.Lock()
        self._inbox: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._untold: list[Event] = []  # events of a step that failed afterwards
        self.preempted = 0
        self._inner = inner
        _open[inner] = ref(self)

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._inbox) + len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._waiting or self._inbox)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the pages in use have room for."""
        return self.pages.used * self.pages.size

    @property
    def cache_tokens(self) -> int:
        """Tokens that the whole cache has room for."""
        return self.pages.count * self.pages.size

    def submit(self, ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Request:
        """`prepare` and `enqueue`: let a prompt be answered as soon as there is room."""
        request = self.prepare(ids, sampling, adapter)
        self.enqueue(request)
        return request

    def prepare(self, ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Request:
        """Check a prompt and what is asked. A schema takes a while, the first one seconds.

        Args:
            ids: the prompt.
            sampling: how the answer is chosen and where it ends.
            adapter: None for the model as it stands, "__base__" for the model without any adapter, or a name.

        Raises:
            OptionError: no tokens, tokens that the model does not have, more than the context takes, no such adapter,
                or a schema that answers cannot be held to.
        """
        ids = list(ids)
        self.adapters.check(adapter)
        if not ids or not all(isinstance(token, int) and 0 <= token < self.vocabulary for token in ids):
            raise OptionError("a prompt is a list of one or more of the model's tokens", where="prompt",
                              found="no tokens" if not ids else "a token that is none",
                              expected=f"ids from 0 to {self.vocabulary - 1}", fix="change the prompt")
        most = min(self.max_context, self.cache_tokens)
        asked = sampling.max_new_tokens if sampling.max_new_tokens is not None else max(most - len(ids), 1)
        if len(ids) + asked > most:
            raise OptionError("prompt and answer are longer than the context", where="prompt, max_new_tokens",
                              found=f"{len(ids)} + {asked} tokens", expected=f"at most {most} together",
                              fix="shorten the prompt or lower max_new_tokens")
        grammar = None if sampling.schema is None else self._grammars.of_schema(sampling.schema)
        return Request(ids, sampling, adapter, asked, Chooser(sampling, ids, grammar),
                       Pieces(self.tokenizer, sampling.stop))

    def enqueue(self, request: Request) -> None:
        """Let a prepared request take part from the next step on. May be called from any thread."""
        with self._lock:
            self._inbox.append(request)

    def cancel(self, request: Request) -> None:
        """Stop answering; the next step frees what the request has, and says so with an event."""
        request.cancelled = True

    def step(self) -> list[Event]:
        """Compute the next tokens. Returns what happened, in no particular order.

        Raises:
            Exception: whatever the model raised. `abort` has to follow.
        """
        self._untold = self._collect()
        events = list(self._untold)
        scheduled = self._schedule()
        if not scheduled:
            return events
        logits = self.runner.run([row for _, row in scheduled])
        wanted = [request for request, row in scheduled if row.wanted]
        if wanted:
            choices = choose_all(logits, [request.chooser for request in wanted],
                                 [request.tokens for request in wanted])
            events += [self._advance(request, *choice) for request, choice in zip(wanted, choices, strict=True)]
        return events

    def abort(self, error: Exception) -> list[Event]:
        """Give up all requests that are being answered, because a step failed; those that wait go on waiting."""
        untold, self._untold = self._untold, []
        return untold + [self._finish(request, "error", error=error) for request in list(self._running)]

    def close(self) -> None:
        """Put the model back into the state it was in. Once is enough: a second time does nothing."""
        self.adapters.close()
        for module, training in self._modes:
            module.training = training
        self._modes = []
        if (owner := _open.get(self._inner)) is not None and owner() is self:
            del _open[self._inner]

    def _collect(self) -> list[Event]:
        with self._lock:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        gone = [request for request in itertools.chain(self._running, self._waiting) if request.cancelled]
        return [self._finish(request, "cancelled") for request in gone]

    def _schedule(self) -> list[tuple[Request, Row]]:
        """Rows of the next pass: a token of each answer, and as much of the prompts as a step takes."""
        scheduled: list[tuple[Request, Row]] = []
        budget = self.step_tokens
        for request in list(self._running):
            if budget <= 0 and request.length - request.computed > 1:
                continue
            if request in self._running and (row := self._row(request, budget)) is not None:
                scheduled.append((request, row))
                budget -= len(row.ids) if len(row.ids) > 1 else 0
        while self._waiting and len(self._running) < self.max_running and budget > 0:
            request = self._waiting[0]
            root = (request.adapter, self._kind(request.length))
            request.pages, request.before = self.pages.match(request.ids(0, request.length), root)
            request.registered = len(request.pages)
            request.computed = request.registered * self.pages.size
            # Room for the whole prompt and a token more, or it would soon have to make room again.
            if self._missing(request, request.length + 1) > self.pages.available and self._running:
                self._let_go(request)
                break
            if not request.tokens:
                request.reused = request.computed
            self._running.append(self._waiting.popleft())
            row = self._row(request, budget)
            if row is None:
                break
            scheduled.append((request, row))
            budget -= len(row.ids)
        return scheduled

    def _row(self, request: Request, budget: int) -> Row | None:
        """The request's next tokens, and room for them; None if there is none and it has to wait."""
        todo = request.length - request.computed
        count = todo if self._whole or todo == 1 else min(todo, budget)
        stop = request.computed + count
        while (missing := self._missing(request, stop)) > 0:
            pages = self.pages.take(missing)
            if pages is not None:
                request.pages += pages
                break
            last = self._running[-1]
            self._preempt(last)
            if last is request:
                return None
        row = Row(request, request.ids(request.computed, stop), request.computed, request.pages, request.adapter,
                  wanted=stop == request.length)
        request.computed = stop
        # Known from now on: a request that joins in this very pass can read them, as layers write before they attend.
        size = self.pages.size
        for index in range(request.registered, stop // size):
            tokens = request.ids(index * size, (index + 1) * size)
            request.before = self.pages.register(request.pages[index], tokens, request.before)
            request.registered = index + 1
        return row

    def _missing(self, request: Request, length: int) -> int:
        return -(-length // self.pages.size) - len(request.pages)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it is computed again when there is room."""
        self.preempted += 1
        self._running.remove(request)
        self._let_go(request)
        self._waiting.appendleft(request)

    def _let_go(self, request: Request, *, broken: bool = False) -> None:
        self.runner.drop(request, self.pages.alone(request.pages), broken=broken)
        self.pages.release(request.pages)
        request.pages, request.computed, request.registered = [], 0, 0

    def _advance(self, request: Request, token: int | None, logprob: Logprob | None, error: Exception | None) -> Event:
        if token is None:
            return self._finish(request, "error", error=error)
        request.tokens.append(token)
        logprobs = () if logprob is None else (logprob,)
        sampling = request.sampling
        if (token in self.ends and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return self._finish(request, "stop", (token,), "", logprobs)
        text = request.pieces.add(token)
        if request.pieces.stopped:
            return self._finish(request, "stop", (token,), text, logprobs)
        if request.chooser.grammar is not None and request.chooser.grammar.complete:
            return self._finish(request, "stop", (token,), text, logprobs)
        if len(request.tokens) >= request.limit:
            return self._finish(request, "length", (token,), text, logprobs)
        return Event(request, (token,), text, None, logprobs)

    def _finish(self, request: Request, reason: str, tokens: tuple[int, ...] = (), text: str = "",
                logprobs: tuple[Any, ...] = (), error: Exception | None = None) -> Event:
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._let_go(request, broken=reason == "error")
        if reason == "error":
            self.pages.forget()
        if reason in ("stop", "length"):
            text += request.pieces.end()
        request.finish_reason = reason
        return Event(request, tokens, text, reason, logprobs, error)
