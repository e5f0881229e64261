"""The order of the rooms: a module imports only what stands below it, and some packages only in their own rooms."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gazelle"

# Rooms on one line are siblings and never import each other.
FLOORS = [
    ["base"],
    ["kernels"],
    ["quantize"],
    ["engine"],
    ["adapters", "data", "guard"],
    ["models"],
    ["generate"],
    ["train", "rl", "compress", "export", "evaluate", "serve"],
    ["facade"],
    ["cli", "studio"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

ALLOWED = {
    "triton": {"kernels"},
    "transformers": {"models", "data", "guard", "generate", "train", "rl", "export", "evaluate", "serve"},
    "bitsandbytes": {"quantize", "cli", "train"},
    "compressed_tensors": {"export"},
    "peft": {"adapters", "models", "export"},
    "fastapi": {"serve", "studio"},
    "starlette": {"serve", "studio"},
    "uvicorn": {"serve", "studio"},
    "prometheus_client": {"base", "serve", "train"},
    "httpx": {"evaluate", "serve", "studio"},
    "requests": {"serve", "studio"},
    "typer": {"cli"},
}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import that happens at run time: those for the type checker alone do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield node.lineno, node.module
        yield from imports(node)


def complaints(room: str, source: str) -> list[str]:
    found = []
    for line, module in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        if top == "gazelle":
            target = rest.split(".")[0]
            if target and target != room and FLOOR[target] >= FLOOR[room]:
                found.append(f"line {line}: {room} imports {target}, which does not stand below it")
        elif top in ALLOWED and room not in ALLOWED[top]:
            found.append(f"line {line}: {top} belongs to {sorted(ALLOWED[top])}, not to {room}")
    return found


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0]
    assert complaints(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("data", "from gazelle.adapters import lora"),
        ("base", "import gazelle.models.load"),
        ("train", "from gazelle.evaluate.cases import Case"),
        ("models", "def f():\n    import triton"),
        ("adapters", "from transformers import AutoConfig"),
    ],
)
def test_the_check_itself_notices(room: str, source: str) -> None:
    assert len(complaints(room, source)) == 1


def test_imports_for_the_type_checker_do_not_count() -> None:
    assert complaints("adapters", "if TYPE_CHECKING:\n    from transformers import AutoConfig") == []


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
