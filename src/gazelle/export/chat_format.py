"""A chat template as what it writes around the messages of each role, found by rendering with it.

For programs that do not run Jinja. What comes out renders conversations as the template does, which is checked on some
that try what templates do otherwise; a template that does more is refused with the conversation that shows it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from gazelle.base.errors import ModelError, shorten

Messages = list[dict[str, Any]]
_S, _U, _A = ("\ue000system\ue000", "\ue000user\ue000", "\ue000assistant\ue000")  # no template looks for these
_OTHER = "\ue000other\ue000"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """What is written where. A conversation begins with `start`, or with `start_alone` if no system message is first.

    Attributes:
        before, after: text around each message by role.
        inner_system: a system message has no turn of its own, but stands at the start of the first user's.
        takes_system: False where the template refuses system messages.
        generation: text behind the last message, for the model to go on from.
        trimmed: roles whose texts lose white space at both ends.
    """

    start: str
    start_alone: str
    before: dict[str, str]
    after: dict[str, str]
    generation: str
    inner_system: bool = False
    takes_system: bool = True
    trimmed: frozenset[str] = frozenset()

    def render(self, messages: Messages) -> str:
        """A conversation that ends with a user's message, and what an answer comes behind."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        parts = [self.start_alone if system is None else self.start]
        for message in messages:
            role, text = message["role"], self._text(message["role"], message["content"])
            if role == "user" and self.inner_system and system is not None:
                text = self.before["system"] + self._text("system", system) + self.after["system"] + text
                system = None
            if not (role == "system" and self.inner_system):
                parts += [self.before[role], text, self.after[role]]
        return "".join([*parts, self.generation])

    def _text(self, role: str, text: str) -> str:
        return text.strip() if role in self.trimmed else text

    @property
    def default_system(self) -> str | None:
        """The system message that the template writes where there is none, if it does."""
        opening, closing = self.start + self.before["system"], self.after["system"]
        alone = self.start_alone
        if self.inner_system or alone == self.start or not (alone.startswith(opening) and alone.endswith(closing)):
            return None
        return alone[len(opening) : len(alone) - len(closing)]


def chat_format(tokenizer: Any) -> ChatFormat:
    """The format of the tokenizer's chat template, without tools.

    Raises:
        ModelError: there is no template, or it does more than write text around messages.
    """
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template", where="tokenizer", found="chat_template is empty",
                         expected="a template that renders messages", fix='choose one: chat_template="chatml"')

    def render(*messages: tuple[str, str], generation: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))

    try:
        found = _around(render)
        found = _with_system(found, render)
        found = replace(found, trimmed=frozenset(role for role in ROLES if _trims(render, role, found)))
        _check(found, render)
    except jinja2.TemplateError as error:
        raise _error("it refuses a question, an answer and a question", str(error)) from error
    return found


def _around(render: Callable[..., str]) -> ChatFormat:
    """Of conversations without a system message: each is what the shorter one was, and more."""
    asked, prompted = render(("user", _U)), render(("user", _U), generation=True)
    answered = render(("user", _U), ("assistant", _A))
    again = render(("user", _U), ("assistant", _A), ("user", _OTHER))
    opening, after_user = _split(asked, _U)
    before_assistant, after_assistant = _split(_rest(answered, asked), _A)
    before_user, last = _split(_rest(again, answered), _OTHER)
    if last != after_user or not opening.endswith(before_user):
        raise _error("the first question is written otherwise than later ones", again)
    start = opening.removesuffix(before_user)
    return ChatFormat(start, start, {"system": "", "user": before_user, "assistant": before_assistant},
                      {"system": "", "user": after_user, "assistant": after_assistant}, _rest(prompted, asked))


def _with_system(found: ChatFormat, render: Callable[..., str]) -> ChatFormat:
    try:
        text = render(("system", _S), ("user", _U))
    except jinja2.TemplateError:
        return replace(found, takes_system=False)
    before, rest = _split(text, _S)
    between, after_user = _split(rest, _U)
    if after_user != found.after["user"]:
        raise _error("what follows a question depends on the system message", text)
    opening = found.before["user"]
    inside = before.startswith(found.start_alone + opening) and bool(opening)
    if between.endswith(opening) and not inside:
        after = between.removesuffix(opening)
        start = before.removesuffix(_opens_system(render, found, after) or before)
        return replace(found, start=start, before=found.before | {"system": before.removeprefix(start)},
                       after=found.after | {"system": after})
    if not inside:
        raise _error("the first question is written otherwise behind a system message", text)
    return replace(found, inner_system=True, after=found.after | {"system": between}, before=found.before | {
        "system": before.removeprefix(found.start_alone + opening)})


def _opens_system(render: Callable[..., str], found: ChatFormat, after: str) -> str:
    """What is written before a system message that is not the first; "" if such ones are written in another way."""
    rows = ("user", _U), ("assistant", _A)
    try:
        before, rest = _split(_rest(render(*rows, ("system", _S), ("user", _OTHER)), render(*rows)), _S)
    except (jinja2.TemplateError, ModelError):
        return ""
    return before if rest == after + found.before["user"] + _OTHER + found.after["user"] else ""


def _trims(render: Callable[..., str], role: str, found: ChatFormat) -> bool:
    if role == "system" and not found.takes_system:
        return False
    padded = f"\n {_OTHER} \n"
    rows = {"system": (("system", padded), ("user", _U)), "user": (("user", padded),),
            "assistant": (("user", _U), ("assistant", padded), ("user", _U))}
    return padded not in render(*rows[role])


def _check(found: ChatFormat, render: Callable[..., str]) -> None:
    """Compare on conversations that templates are known to treat in ways of their own."""
    odd = [("user", "{{ 1 }} {% if %} \"\"\" <|im_end|>\n"), ("assistant", "<think>\nso\n</think>\n\n  yes \n"),
           ("user", "  why? "), ("assistant", "because"), ("user", "")]
    plain = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    cases = [odd, plain, plain[:1]]
    if found.takes_system:
        cases += [[("system", text), *case] for text in ("Be brief.", " Two\n\nlines. \n") for case in cases]
    for case in cases:
        want = render(*case, generation=True)
        got = found.render([{"role": role, "content": content} for role, content in case])
        if want != got:
            at = next((i for i, (left, right) in enumerate(zip(want, got, strict=False)) if left != right),
                      min(len(want), len(got)))
            raise _error("messages are changed, or written by more than their role",
                         f"{want[max(0, at - 30):at + 50]!r} where {got[max(0, at - 30):at + 50]!r} was to be expected")


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _error("a message is left out, or is there twice", text)
    before, _, after = text.partition(mark)
    return before, after


def _rest(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise _error("a message is written otherwise when more follow", longer)
    return longer[len(shorter):]


def _error(what: str, found: str) -> ModelError:
    for mark in (_S, _U, _A, _OTHER):
        found = found.replace(mark, mark.strip("\ue000").upper())
    return ModelError(f"the chat template does more than a template for this program can: {what}",
                      where="tokenizer.chat_template", found=shorten(found, 200),
                      expected="text around messages that depends on their role alone",
                      fix='train with one of gazelle\'s templates, such as chat_template="chatml", or export to GGUF '
                      "and run it with a program that reads the file's own template, such as llama-server --jinja")
