"""Models that answer, all behind one interface: in memory, behind an address, or in another program."""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gazelle.base.device import device_name
from gazelle.base.errors import OptionError
from gazelle.base.memory import memory_growth
from gazelle.data.conversation import Conversation, Turn
from gazelle.data.encode import IGNORED, encode
from gazelle.evaluate.cases import Case, Messages
from gazelle.models.generate import generate_texts, stream_text
from gazelle.models.load import load_config, load_model
from gazelle.models.modes import evaluating
from gazelle.models.record import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """An answer, and where it was timed, with nothing else going on: seconds to its first piece and to its end, and
    its tokens."""

    text: str
    first_token: float | None = None
    seconds: float | None = None
    tokens: int | None = None


class Answerer(ABC):
    """A model that is asked, between `open` and `close`.

    Attributes:
        runs_on: the program and the device or address, once it is open.
        memory: most bytes in use while it answered, weights included, once it has; None where nothing tells.
    """

    runs_on: str = ""
    memory: int | None = None

    def check(self) -> None:  # noqa: B027 — there may be nothing that can go wrong
        """See in little time whether `open` can work: a model that is not there must not be told of hours later.

        Raises:
            UserError: it cannot.
        """

    def open(self) -> None:  # noqa: B027 — there may be nothing to load
        """Load what is needed."""

    def close(self) -> None:  # noqa: B027
        """Give back what `open` took."""

    @abstractmethod
    def ask(self, cases: Sequence[Case], max_new_tokens: int, timed: Sequence[int] = ()) -> list[Reply]:
        """A reply to each case, greedily decoded; those whose numbers are in `timed` are timed one at a time."""

    def surprise(self, cases: Sequence[Case]) -> list[tuple[float, int]] | None:
        """For each case, the first expected answer's negative log-likelihood in nats, and its tokens, the one that
        ends it included. None where a model does not tell."""
        return None


class LocalModel(Answerer):
    """A model in this process.

    Args:
        model: a Hugging Face causal model, with or without an adapter; or a folder, hub name or GGUF file, which is
            loaded when it is its turn, and let go of afterwards.
        tokenizer: of a model; a folder brings its own.
        batch_size: cases that are answered at a time, as long as they are not timed.
        load_in_4bit: for a folder; None keeps an adapter's base as it was in training, and all else as it is stored.
    """

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase | None" = None, *, batch_size: int = 16,
                 load_in_4bit: bool | None = None) -> None:
        self._source = str(model) if isinstance(model, str | Path) else None
        self.model: Any = None if self._source else model
        self.tokenizer: Any = tokenizer
        self._batch_size, self._load_in_4bit = batch_size, load_in_4bit
        if self._source is None and tokenizer is None:
            raise OptionError("a model without its tokenizer cannot be asked", where="tokenizer", found="none",
                              expected="the tokenizer that the model was loaded with", fix="pass tokenizer=")

    def check(self) -> None:
        if self._source is not None:
            load_config(self._source)

    def open(self) -> None:
        if self._source is not None:
            recorded = (Path(self._source) / RECORD).exists()
            in_4bit = self._load_in_4bit if recorded or self._load_in_4bit else False
            self.model, self.tokenizer = load_model(self._source, load_in_4bit=in_4bit, is_trainable=False)
        self.runs_on = f"gazelle on {device_name(str(self._device))}"

    def close(self) -> None:
        if self._source is not None:
            self.model = self.tokenizer = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def ask(self, cases: Sequence[Case], max_new_tokens: int, timed: Sequence[int] = ()) -> list[Reply]:
        prompts = [self._prompt(case) for case in cases]
        with memory_growth(str(self._device)) as growth:
            texts = generate_texts(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens,
                                   batch_size=self._batch_size)
        weights = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        self.memory = None if growth.bytes is None else weights + growth.bytes
        replies = [Reply(text) for text in texts]
        if timed:
            self._time(prompts[timed[0]], 2)  # what the first call sets up is nobody's latency
        for number in timed:
            replies[number] = Reply(texts[number], *self._time(prompts[number], max_new_tokens))
        return replies

    def _prompt(self, case: Case) -> Messages | str:
        # The tokenizer of a base model may have no chat template: a lone question goes to it as it is.
        plain = not self.tokenizer.chat_template and len(case.turns) == 1
        return case.question if plain else case.messages

    def _time(self, prompt: Messages | str, max_new_tokens: int) -> tuple[float, float, int]:
        """Seconds to the first piece and to the end, and tokens."""
        began, first, text = time.perf_counter(), None, ""
        for piece in stream_text(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens):
            first = first or time.perf_counter() - began
            text += piece
        seconds = time.perf_counter() - began
        return first or seconds, seconds, len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def surprise(self, cases: Sequence[Case]) -> list[tuple[float, int]] | None:
        model, found = self.model, []
        with torch.no_grad(), evaluating(model):
            for case in cases:
                ids, labels = labelled(self.tokenizer, case)
                start = next(at for at, label in enumerate(labels) if label != IGNORED)
                logits = model(input_ids=torch.tensor([ids], device=self._device), use_cache=False,
                               logits_to_keep=len(ids) - start + 1).logits[0, :-1]
                targets = torch.tensor(labels[start:], device=logits.device)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum",
                                                         ignore_index=IGNORED)
                found.append((float(loss), sum(label != IGNORED for label in labels)))
        return found


def prompt_ids(tokenizer: Any, case: Case) -> list[int]:
    """Ids [T] of a case up to where the answer begins.

    Raises:
        OptionError: a conversation, and a tokenizer without a chat template.
    """
    if tokenizer.chat_template:
        ids: list[int] = tokenizer.apply_chat_template(case.messages, add_generation_prompt=True,
                                                       return_dict=True)["input_ids"]
        return ids
    if len(case.turns) > 1:
        raise OptionError("the tokenizer has no chat template", where=case.where, found="a conversation",
                          expected="a lone question, or a tokenizer with a chat template", fix="leave the model out")
    return list(tokenizer(case.question)["input_ids"])


def labelled(tokenizer: Any, case: Case) -> tuple[list[int], list[int]]:
    """Ids [T] of a case with its first expected answer, and labels [T] on that answer and the token that ends it."""
    if not tokenizer.chat_template and len(case.turns) == 1:
        prompt = prompt_ids(tokenizer, case)
        answer = [*tokenizer(case.expected[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return prompt + answer, [IGNORED] * len(prompt) + answer
    asked = tuple(Turn(turn.role, turn.content, turn.extra, train=False) for turn in case.turns)
    row = Conversation((*asked, Turn("assistant", case.expected[0])), case.where)
    example = encode([row], tokenizer, max_length=1 << 30).examples[0]
    return list(example.input_ids), list(example.labels)
