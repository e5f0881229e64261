"""What a caller may ask of one answer."""

import json
from dataclasses import dataclass, fields
from typing import Any

from gazelle.base.errors import OptionError, nearest

# vLLM's names of what is called otherwise here.
_NAMES = {"max_tokens": "max_new_tokens", "stop_strings": "stop", "eos_token_ids": "stop_token_ids"}
# name -> (least, most); the ends are allowed
_RANGES = {"max_new_tokens": (1, 1 << 24), "temperature": (0, 100), "top_k": (-1, 1 << 24), "min_p": (0, 1),
           "repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
           "logprobs": (0, 20), "seed": (-(1 << 63), (1 << 63) - 1)}
_WHOLE = ("max_new_tokens", "top_k", "logprobs", "seed")
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_GREEDY = 1e-5  # vLLM's, too: below it the likeliest token has all of the probability
# What vLLM's objects may ask for beyond `Sampling`, and what they have where it is not asked for.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,), "logit_bias": (None, {}), "allowed_token_ids": (None, []), "bad_words": (None, []),
    "logits_processors": (None, []), "structured_outputs": (None,), "guided_decoding": (None,),
    "prompt_logprobs": (None,), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
}


@dataclass(frozen=True)
class Sampling:
    """How one answer is chosen and where it ends.

    Attributes:
        max_new_tokens: tokens the answer may have; None for as many as the context takes.
        temperature: 0, or next to it, takes the likeliest token each time, more draws at random.
        top_p: draw from the likeliest tokens that hold this share of the probability together.
        top_k: draw from this many likeliest tokens; 0 or -1 for all.
        min_p: drop tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens seen in prompt and answer (https://arxiv.org/abs/1909.05858).
        presence_penalty, frequency_penalty: subtracted from the logits of the answer's own tokens, once or each time.
        seed: of the draws; with it an answer does not depend on what else runs.
        stop: texts that end the answer, and are no part of it.
        stop_token_ids: tokens that end it, besides the model's own.
        ignore_eos: go on after the model's end tokens.
        schema: a JSON schema that the answer is held to.
        logprobs: None for none, 0 for each token's own, n for that of the n likeliest as well.
    """

    max_new_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    schema: dict[str, Any] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("max_new_tokens", "seed", "logprobs"):
                continue
            kind = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                raise _wrong(name, value, f"a {'whole ' * (name in _WHOLE)}number from {least} to {most}")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise _wrong("top_p", self.top_p, "above 0 and at most 1")
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | list | tuple | set | frozenset):
                raise _wrong(name, value, "a list")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > _MOST_STOPS or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP
                                              for text in stop):
            raise _wrong("stop", self.stop, f"at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if not all(isinstance(token, int) for token in self.stop_token_ids):
            raise _wrong("stop_token_ids", self.stop_token_ids, "whole numbers")
        if isinstance(self.schema, str):
            try:
                object.__setattr__(self, "schema", json.loads(self.schema))
            except json.JSONDecodeError as error:
                raise _wrong("schema", self.schema, "a JSON schema, as a dict or as text") from error
        if self.schema is not None and not isinstance(self.schema, dict):
            raise _wrong("schema", self.schema, "a JSON schema, as a dict or as text")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY

    @property
    def penalised(self) -> bool:
        """Whether tokens that came before count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def sampling_of(params: Any = None, **options: Any) -> Sampling:
    """A `Sampling` of vLLM's `SamplingParams`, of a dict, of a `Sampling`, of keyword arguments, or of some of these.

    Raises:
        OptionError: a name that is not known, a value out of range, or something vLLM does and this does not.
    """
    known = {field.name for field in fields(Sampling)}
    if params is None:
        given: dict[str, Any] = {}
    elif isinstance(params, dict):
        given = dict(params)
    else:
        names = (*known, *_NAMES)
        if not any(hasattr(params, name) for name in names):
            raise OptionError("these are no options of generation", where="sampling_params", found=repr(params),
                              expected="a Sampling, vLLM's SamplingParams or a dict",
                              fix="name the option, such as max_new_tokens=64")
        for name, idle in _NOT_HERE.items():
            if (value := getattr(params, name, idle[0])) not in idle:
                raise OptionError("generation has no such option", where=name, found=repr(value),
                                  expected="an option of Sampling", fix="leave it out")
        given = {name: getattr(params, name) for name in names if getattr(params, name, None) is not None}
        if not isinstance(params, Sampling):
            given.pop("schema", None)  # pydantic objects have a method of that name
    if "do_sample" in options and not options.pop("do_sample"):
        options["temperature"] = 0.0
    given |= options
    given = {_NAMES.get(name, name): value for name, value in given.items()}
    for name in given:
        if name not in known:
            raise OptionError("no such option of generation", where=name, found=name,
                              expected="an option of Sampling", fix=nearest(name, known))
    return Sampling(**given)


def _wrong(name: str, found: object, expected: str) -> OptionError:
    return OptionError("a value out of range", where=name, found=repr(found), expected=expected, fix=f"change {name}")
