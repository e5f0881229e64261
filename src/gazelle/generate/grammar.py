"""Answers held to a JSON schema, by the llguidance library."""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gazelle.base.errors import OptionError
from gazelle.base.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarError(RuntimeError):
    """An answer cannot go on as its schema wants it."""


class Grammars:
    """Makes one `Grammar` an answer; the tokenizer is read once, when the first is made.

    Args:
        tokenizer: of the model.
        rows: of the logits.
        ends: the model's end tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rows: int, ends: tuple[int, ...]) -> None:
        self._tokenizer, self._rows, self._ends = tokenizer, rows, ends
        self._read: Any = None

    def of_schema(self, schema: dict[str, Any]) -> "Grammar":
        """What holds an answer to `schema`.

        Raises:
            MissingDependencyError: llguidance is not installed.
            OptionError: the schema is none, or asks for what the library does not know.
        """
        llguidance = require("llguidance")
        if self._read is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None or not self._ends:
                raise OptionError("answers of this model cannot be held to a schema", where="schema",
                                  found=type(self._tokenizer).__name__,
                                  expected="a tokenizer of the tokenizers library, and an end token",
                                  fix="leave schema out")
            self._read = require("llguidance.hf").from_tokenizer(self._tokenizer, n_vocab=self._rows,
                                                                 eos_token=list(self._ends))
        try:
            # White space at will lets a small model write nothing else until its tokens are used up.
            text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema),
                                                                 defaults={"whitespace_flexible": False})
        except ValueError as error:
            raise _refused(schema, str(error)) from error
        if problem := llguidance.LLMatcher.validate_grammar(text, self._read):
            raise _refused(schema, problem)
        return Grammar(llguidance.LLMatcher(self._read, text, log_level=0))


class Grammar:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def narrow(self, logits: Tensor) -> Tensor:
        """`logits` [V] with -inf for all tokens that may not come."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        allowed[:len(bias)] = bias[:logits.shape[-1]] > 0
        if not allowed.any():
            raise GrammarError("the answer cannot go on as its schema wants it: no token may come")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> None:
        """Go on after `token`."""
        if not self._matcher.consume_token(token):
            raise GrammarError(f"the answer cannot go on as its schema wants it: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may come."""
        return self._matcher.is_stopped()


def _refused(schema: dict[str, Any], why: str) -> OptionError:
    return OptionError(f"answers cannot be held to this schema: {why}", where="schema", found=json.dumps(schema),
                       expected="a JSON schema", fix="change or leave out what is named above")
