"""Go's text/template, as much of it as templates for Ollama use, written from its documentation for tests alone.

Where Go is installed, tests/export/test_ollama.py runs the real one beside it.
"""

import re
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|:=|=|,|\$\w*(?:\.\w+)*|\.\w+(?:\.\w+)*|\.|-?\d+|\w+)')


@dataclass
class Node:
    kind: str
    code: list[str] = field(default_factory=list)
    text: str = ""
    body: list["Node"] = field(default_factory=list)
    other: list["Node"] = field(default_factory=list)


def tokens(code: str) -> list[str]:
    found, at = [], 0
    while code[at:].strip():
        match = TOKEN.match(code, at)
        assert match, f"cannot read {code[at:]!r}"
        found.append(match[1])
        at = match.end()
    return found


class Template:
    def __init__(self, source: str) -> None:
        self.pieces = re.split(r"\{\{(.*?)\}\}(?!\")", re.sub(r'\{\{ "\{\{" \}\}', "\0", source), flags=re.DOTALL)
        self.at = 0
        self.defined: dict[str, list[Node]] = {}
        self.root, end = self.block()
        assert end == [], f"an end too many: {end}"

    def block(self) -> tuple[list[Node], list[str]]:
        """Nodes up to the `end` or `else` that closes them, and that."""
        nodes = []
        while self.at < len(self.pieces):
            piece, action = self.pieces[self.at], self.at % 2
            self.at += 1
            if not action:
                nodes.append(Node("text", text=piece.replace("\0", "{{")))
                continue
            code = tokens(piece)
            if code[0] in ("end", "else"):
                return nodes, code
            if code[0] in ("if", "range", "define"):
                nodes.append(self.compound(code))
            else:
                nodes.append(Node("template" if code[0] == "template" else "action", code))
        return nodes, []

    def compound(self, code: list[str]) -> Node:
        node = Node(code[0], code[1:])
        node.body, end = self.block()
        if end[1:2] == ["if"]:
            node.other = [self.compound(end[1:])]
        elif end == ["else"]:
            node.other, end = self.block()
            assert end == ["end"]
        if node.kind == "define":
            self.defined[node.code[0].strip('"')] = node.body
        return node

    def execute(self, data: Any) -> str:
        out: list[str] = []
        self.run(self.root, data, [{"$": data}], out)
        return "".join(out)

    def run(self, nodes: list[Node], dot: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
        for node in nodes:
            if node.kind == "text":
                out.append(node.text)
            elif node.kind == "template":
                value = Expression(node.code[2:], dot, scopes).value()
                self.run(self.defined[node.code[1].strip('"')], value, [{"$": value}], out)
            elif node.kind == "if":
                chosen = node.body if Expression(node.code, dot, scopes).value() else node.other
                self.run(chosen, dot, [*scopes, {}], out)
            elif node.kind == "range":
                assert node.code[1] == "," and node.code[3] == ":="
                for number, item in enumerate(Expression(node.code[4:], dot, scopes).value()):
                    self.run(node.body, item, [*scopes, {node.code[0]: number, node.code[2]: item}], out)
            elif node.kind == "action" and node.code[1:2] in ([":="], ["="]):
                value = Expression(node.code[2:], dot, scopes).value()
                scope = scopes[-1] if node.code[1] == ":=" else next(s for s in scopes[::-1] if node.code[0] in s)
                scope[node.code[0]] = value
            elif node.kind == "action":
                out.append(str(Expression(node.code, dot, scopes).value()))


class Expression:
    def __init__(self, code: list[str], dot: Any, scopes: list[dict[str, Any]]) -> None:
        self.code, self.dot, self.scopes, self.at = code, dot, scopes, 0

    def value(self) -> Any:
        """A call with all that follows as its arguments, or one operand."""
        if self.code[self.at] in CALLS:
            name = self.code[self.at]
            self.at += 1
            arguments = []
            while self.at < len(self.code) and self.code[self.at] != ")":
                arguments.append(self.operand())
            return CALLS[name](*arguments)
        return self.operand()

    def operand(self) -> Any:
        code = self.code[self.at]
        self.at += 1
        if code == "(":
            value = self.value()
            assert self.code[self.at] == ")"
            self.at += 1
            return value
        if code.startswith('"'):
            return code[1:-1].encode().decode("unicode_escape")
        if code.lstrip("-").isdecimal():
            return int(code)
        start, *names = code.split(".")
        value = next(scope[start] for scope in self.scopes[::-1] if start in scope) if start else self.dot
        for name in filter(None, names):
            value = value[name]
        return value


def sliced(value: Any, *bounds: int) -> Any:
    part = slice(*bounds) if len(bounds) > 1 else slice(bounds[0], None)
    return value.encode(**BYTES)[part].decode(**BYTES) if isinstance(value, str) else value[part]


BYTES = {"errors": "surrogateescape"}  # Go slices texts by their bytes
CALLS = {
    "eq": lambda first, *others: any(first == other for other in others), "ne": lambda a, b: a != b,
    "and": lambda *values: next((value for value in values if not value), values[-1]), "slice": sliced,
    "not": lambda value: not value,
    "len": lambda value: len(value.encode(**BYTES)) if isinstance(value, str) else len(value),
}
