"""Cells of a row to turns: roles, texts and tool calls, each checked."""

import json
from typing import Any

from gazelle.base.errors import DataError, nearest
from gazelle.data.conversation import Role, Turn
from gazelle.data.parse import load_json

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "系统": "system",
    "user": "user", "human": "user", "prompter": "user", "用户": "user", "人类": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "助手": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}


def text_of(value: Any, name: str, where: str, *, optional: bool = False) -> str:
    """`value` if it is a usable text; a missing `optional` one is "".

    Raises:
        DataError: missing, empty, not a string, or holding half a surrogate pair, which no tokenizer takes.
    """
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name!r} is {'missing' if value is None else 'not a text'}", where=where,
                        found="null" if value is None else f"{value!r}, a {type(value).__name__}", expected="a text",
                        fix="remove the row, or fill it in" if value is None else f'write it in quotes: "{value}"')
    if not value.strip() and not optional:
        raise DataError(f"{name!r} is empty", where=where, found=repr(value), expected="a text",
                        fix="remove the row, or fill it in")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!r} holds half of a character", where=where, found=ascii(value),
                        expected="whole Unicode characters",
                        fix=r"remove \ud800 to \udfff where they stand alone") from error
    return value


def turns_of(value: Any, name: str, where: str) -> list[Turn]:
    """The turns of a list of messages: {"role", "content"} or {"from", "value"}, or such a list as a JSON string."""
    messages = json_of(value, name, where) if isinstance(value, str) else value
    if not isinstance(messages, list | tuple):
        raise DataError(f"{name!r} is {'missing' if messages is None else 'not a list of messages'}", where=where,
                        found="null" if messages is None else repr(messages),
                        expected='[{"role": "user", "content": ...}, ...]', fix="remove the row, or write it as a list")
    if not messages:
        raise DataError(f"{name!r} is empty", where=where, found="[]", expected="at least one assistant message",
                        fix="remove the row")
    return [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _turn(message: Any, where: str) -> Turn:
    keys = ("role", "content") if isinstance(message, dict) and "role" in message else ("from", "value")
    if not isinstance(message, dict) or keys[0] not in message:
        raise DataError("a message has no role", where=where, found=repr(message),
                        expected='{"role": ..., "content": ...} or {"from": ..., "value": ...}',
                        fix="name the role of every message")
    name = message[keys[0]]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"unknown role {name!r}", where=where, found=repr(name),
                        expected="system, user, assistant or tool", fix=nearest(str(name), ROLES))
    extra = {key: value for key, value in message.items()
             if value is not None and key not in (*keys, "weight")}
    content = message.get(keys[1])
    if name == "function_call":
        extra["tool_calls"], content = [{"type": "function", "function": json_of(content, keys[1], where)}], ""
    if "tool_calls" in extra:
        extra["tool_calls"] = [_tool_call(call, where) for call in json_list(extra["tool_calls"], "tool_calls", where)]
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    may_be_empty = role in ("system", "tool") or bool(extra.get("tool_calls"))
    return Turn(role, text_of(content, keys[1], where, optional=may_be_empty), extra, message.get("weight") != 0)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise DataError("a message holds something other than text", where=where, found=repr(part),
                        expected='{"type": "text", "text": ...}', fix="remove images, audio and files from the row")
    return text_of(part.get("text"), "text", where)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """An OpenAI tool call with its arguments as an object: chat templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("a tool call names no function", where=where, found=repr(call),
                        expected='{"type": "function", "function": {"name": ..., "arguments": {...}}}',
                        fix="name the function of every tool call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json_of(arguments, "arguments", where)
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def json_of(value: Any, name: str, where: str) -> Any:
    """The value that the JSON string `value` stands for."""
    text = text_of(value, name, where)
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name!r} is not valid JSON", where=where, found=f"{error.msg} in {text!r}",
                        expected="a list or object, or one written as a JSON string", fix="mend the row") from error


def json_list(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as a JSON string; nothing at all is the empty list."""
    if value is None or value == "":
        return []
    entries = json_of(value, name, where) if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{name!r} is not a list of objects", where=where, found=repr(value), expected="[{...}, ...]",
                        fix="mend the row")
    return list(entries)
