"""Chat templates as scripts ask for them: by name on a tokenizer, or written as a text with {INPUT} and {OUTPUT}."""

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError
from gazelle.base.log import say_once
from gazelle.data.sharegpt import as_dataset
from gazelle.data.templates import ensure_template

if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = ("role", "content", "user", "assistant")


def get_chat_template(tokenizer: Any, chat_template: str | tuple[str, str] = "chatml",
                      mapping: Mapping[str, str] | None = None, map_eos_token: bool = True,
                      system_message: str | None = None) -> Any:
    """Give a tokenizer a chat template; returns the tokenizer.

    Args:
        tokenizer: changed in place.
        chat_template: a name, the Jinja text of another one, or a pair of such a text and its EOS token.
        mapping: what messages call {"role", "content", "user", "assistant"}, such as {"role": "from", "content":
            "value", "user": "human", "assistant": "gpt"}. Messages under the usual names are rendered as well.
        map_eos_token: make the token that ends a turn the EOS token, so that answers stop there.
        system_message: for conversations that bring none.

    Raises:
        OptionError: no such template, or a mapping of other names.
        ModelError: the tokenizer lacks the template's tokens.
    """
    eos = None
    if isinstance(chat_template, tuple | list):
        chat_template, eos = chat_template
    if unknown := [name for name in mapping or {} if name not in (*_NAMES, "system", "tool")]:
        raise OptionError("a mapping names other things", where="mapping", found=", ".join(unknown),
                          expected=", ".join(_NAMES), fix="write it the other way round: {'role': 'from', ...}")
    ensure_template(tokenizer, "", chat_template)
    opening = ""
    if mapping is not None and any(mapping.get(name, name) != name for name in _NAMES):
        opening += _renaming(mapping)
    if system_message is not None:
        opening += ("{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', 'content': "
                    f"{json.dumps(system_message, ensure_ascii=False)}}}] + messages %}}{{%- endif %}}\n")
    tokenizer.chat_template = opening + tokenizer.chat_template
    if eos is not None:
        tokenizer.eos_token = eos
    elif map_eos_token and (closing := _closing(tokenizer)) and closing != tokenizer.eos_token:
        tokenizer.eos_token = closing
    return tokenizer


def _renaming(mapping: Mapping[str, str]) -> str:
    """Jinja that brings messages to role and content; they may be so named already."""
    role, content = (json.dumps(mapping.get(name, name)) for name in ("role", "content"))
    roles = json.dumps({mapping[name]: name for name in mapping if name not in ("role", "content")})
    return ("{%- set renamed = namespace(messages=[]) %}{%- for message in messages %}"
            f"{{%- set role = message[{role}] if {role} in message else message['role'] %}}"
            f"{{%- set content = message[{content}] if {content} in message else message['content'] %}}"
            f"{{%- set renamed.messages = renamed.messages + [dict(message, role={roles}.get(role, role), "
            "content=content)] %}{%- endfor %}{%- set messages = renamed.messages %}\n")


def _closing(tokenizer: Any) -> str | None:
    """The token that ends what the assistant says, if one does."""
    from gazelle.data.spans import Renderer

    closing = Renderer(tokenizer).closing.strip()
    return closing if closing in tokenizer.get_vocab() else None


def apply_chat_template(dataset: Any, tokenizer: Any, chat_template: str | None = None,
                        default_system_message: str | None = None, extra_eos_tokens: Any = None) -> "Dataset":
    """The data set with a column "text": its conversations, rendered.

    Args:
        dataset: with a column "conversations" (or "messages") of {"role", "content"} messages.
        tokenizer: its chat template is used, and is set if `chat_template` is given.
        chat_template: a text of two turns, with {INPUT} and {OUTPUT} twice each and {SYSTEM} at most once. EOS is
            written behind every answer.
        default_system_message: for {SYSTEM}, of conversations that bring none.
        extra_eos_tokens: taken because scripts pass it.

    Raises:
        OptionError: the template lacks {INPUT} or {OUTPUT}, or its turns differ.
    """
    data = as_dataset(dataset)
    if extra_eos_tokens:
        say_once("apply_chat_template(extra_eos_tokens=…) has no effect: EOS ends every answer")
    if chat_template is not None:
        tokenizer.chat_template = _template_of(chat_template, default_system_message)
    column = next((name for name in ("conversations", "messages") if name in data.column_names), None)
    if column is None:
        raise OptionError("there is no column of conversations", where="apply_chat_template",
                          found=", ".join(data.column_names), expected='"conversations" or "messages"',
                          fix="make it with to_sharegpt and standardize_sharegpt")

    def texts(batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = [[{name: value for name, value in message.items() if value is not None} for message in row]
                for row in batch[column]]
        return {"text": [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]}

    return data.map(texts, batched=True, load_from_cache_file=False)


def _template_of(text: str, default_system: str | None) -> str:
    """Jinja for a template written as a text of two turns."""
    parts: list[str] = []
    rest = text
    for field in ("{INPUT}", "{OUTPUT}", "{INPUT}", "{OUTPUT}"):
        before, found, rest = rest.partition(field)
        if not found or "{INPUT}" in before or "{OUTPUT}" in before:
            raise OptionError("the template does not show two turns", where="chat_template", found=text,
                              expected="{INPUT} and {OUTPUT}, in turn, twice",
                              fix="write a question and an answer, and both once more, as they follow")
        parts.append(before)
    opening, answer, question, again = parts
    if answer != again:
        raise OptionError("the two turns of the template differ", where="chat_template", found=repr(again),
                          expected=repr(answer), fix="write the same before both {OUTPUT}")
    if "{SYSTEM}" in opening and default_system is None:
        default_system = ""
    # What opens a question stands in both turns: the rest of the opening is said once. The template may part its turns
    # with white space or a token that the second question brings along.
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opening[::-1], question[::-1], strict=False))
    header = "".join(left for left, _ in shared)[::-1]
    system, _, behind = opening[: len(opening) - len(header)].partition("{SYSTEM}")
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in
              {"system": system, "behind": behind, "header": header, "question": question, "answer": answer,
               "default": default_system or ""}.items()}
    said, given = "", "false"
    if "{SYSTEM}" in opening:
        said = f"+ (messages[0]['content'] if given else {quoted['default']})"
        given = "messages[0]['role'] == 'system'"
    return (
        f"{{%- set given = {given} %}}\n"
        f"{{{{- {quoted['system']} {said} + {quoted['behind']} }}}}\n"
        "{%- for message in (messages[1:] if given else messages) %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        f"        {{{{- ({quoted['header']} if loop.first else {quoted['question']}) + message['content'] }}}}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        f"        {{{{- {quoted['answer']} + message['content'] + eos_token }}}}\n"
        "    {%- else %}{{- raise_exception('This format has no role ' + message['role']) }}\n"
        "    {%- endif %}\n{%- endfor %}\n"
        f"{{%- if add_generation_prompt %}}{{{{- {quoted['answer']} }}}}{{%- endif %}}\n"
    )
