"""The next token of each row, and how likely it was."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.generate.grammar import Grammar, GrammarError
from gazelle.generate.options import Sampling


class Logprob(NamedTuple):
    """A token, its log-probability before any option of sampling, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Choice(NamedTuple):
    """The next token of a row, or what is wrong with that row alone."""

    token: int | None
    logprob: Logprob | None = None
    error: Exception | None = None


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
        prompt: the ids that a repetition penalty counts.
        grammar: what the answer is held to.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        self.sampling, self._prompt, self.grammar = sampling, prompt, grammar
        self.plain = sampling.greedy and not sampling.penalised and grammar is None
        self._draws = torch.Generator()
        if sampling.seed is not None:
            self._draws.manual_seed(sampling.seed)
        else:
            self._draws.seed()

    def choose(self, logits: Tensor, answer: Sequence[int]) -> int:
        """The next token by `logits` [V] in float32, after the tokens of `answer`."""
        if self.sampling.penalised:
            logits = self._penalised(logits, answer)
        if self.grammar is not None:
            logits = self.grammar.narrow(logits)
        token = int(logits.argmax()) if self.sampling.greedy else self._draw(logits)
        if self.grammar is not None:
            self.grammar.take(token)
        return token

    def _penalised(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        options, logits = self.sampling, logits.clone()
        if options.repetition_penalty != 1:
            seen = torch.tensor([*self._prompt, *answer], device=logits.device).unique()
            found, factor = logits[seen], options.repetition_penalty
            logits[seen] = torch.where(found < 0, found * factor, found / factor)
        if answer and (options.presence_penalty or options.frequency_penalty):
            tokens, times = torch.tensor(answer, device=logits.device).unique(return_counts=True)
            logits[tokens] -= options.presence_penalty + options.frequency_penalty * times
        return logits

    def _draw(self, logits: Tensor) -> int:
        chances = narrowed(logits, self.sampling).softmax(-1)
        # Drawn on the host, whose generator gives the same numbers everywhere.
        return int(torch.multinomial(chances.cpu(), 1, generator=self._draws))


def narrowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [V] that a token is drawn by: by temperature, and -inf where top_k, top_p and min_p say so, in that order.

    A token is in `top_p` if those likelier than it hold less than that together.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        chances, order = logits.softmax(-1).sort(descending=True, stable=True)
        dropped = chances.cumsum(-1) - chances >= sampling.top_p
        dropped[0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(0, order, dropped), float("-inf"))
    if sampling.min_p > 0:
        chances = logits.softmax(-1)
        logits = logits.masked_fill(chances < sampling.min_p * chances.max(), float("-inf"))
    return logits


def choose_all(logits: Tensor, choosers: Sequence[Chooser], answers: Sequence[Sequence[int]]) -> list[Choice]:
    """The next token of each row of `logits` [R, V].

    Greedy rows without anything else are chosen at once, with one wait for the device.
    """
    best, tokens = logits.max(-1)
    broken = ~best.isfinite()
    taken = torch.stack([tokens, broken.long()]).tolist()
    found = []
    for row, chooser in enumerate(choosers):
        if taken[1][row]:
            found.append(Choice(None, error=ModelError(
                "the model's logits hold a NaN", where="generation", found="NaN or infinity", expected="numbers",
                fix="load the model in bfloat16 or float32")))
            continue
        try:
            # Each row is in float32 by itself: a batch of large vocabularies would need a lot of room.
            token = taken[0][row] if chooser.plain else chooser.choose(logits[row].float(), answers[row])
        except GrammarError as error:
            found.append(Choice(None, error=error))
            continue
        wanted = chooser.sampling.logprobs
        found.append(Choice(token, None if wanted is None else _logprob(logits[row], token, wanted)))
    return found


def _logprob(logits: Tensor, token: int, number: int) -> Logprob:
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(number)
    return Logprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
