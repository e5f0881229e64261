"""Benchmarks can be found and begin. Nothing is timed here."""

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("*.py") if not path.stem.startswith("_"))


def test_each_op_has_a_file():
    """int8 is in that of fp8."""
    kernels = {path.stem.removesuffix("_triton") for path in (ROOT / "src/gazelle/kernels").glob("*_triton.py")}
    assert kernels - {"int8"} <= set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_cases(name):
    module = importlib.import_module(f"benchmarks.ops.{name}")
    assert inspect.isgeneratorfunction(module.cases) and not inspect.signature(module.cases).parameters
    assert module.__doc__
    tree = ast.parse(inspect.getsource(module))
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':"), "it cannot be run alone"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_is_there(path):
    """Also inside of functions, which no test runs: they would only be missed after minutes of measuring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gazelle":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)
                    and importlib.util.find_spec(f"{node.module}.{alias.name}") is None] == []


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)


def test_help_names_every_op_and_loads_nothing():
    done = run("-X", "importtime", "-m", "benchmarks.ops", "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in OPS)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not {"torch", "triton", "gazelle"} & loaded


def test_an_unknown_op_is_refused():
    done = run("-m", "benchmarks.ops", "norm", "nrom")
    assert done.returncode == 2 and "no such op: nrom" in done.stderr


def test_results_are_kept_by_op(tmp_path, monkeypatch, capsys):
    """Those of other ops stay, if they were measured on the same machine; what an op gave before it failed, too."""
    runner = importlib.import_module("benchmarks.ops.__main__")
    facts = {"device": "cpu", "gpu": None, "versions": {"torch": "2"}, "cores": 2, "date": "2026-11-24"}
    out = tmp_path / "results" / "ops.json"

    class Op:
        def __init__(self, ms, fails=False):
            self.ms, self.fails = ms, fails

        def cases(self):
            yield {"op": name, "case": "a", "ms": self.ms, "gb_s": 1.0}
            if self.fails:
                raise RuntimeError("out of memory")

    def measured():
        held = json.loads(out.read_text())
        return held["machine"]["cores"], [(case["op"], case["ms"]) for case in held["cases"]]

    monkeypatch.setattr(runner, "machine", lambda: dict(facts))
    for name, op, code, want in [
        ("norm", Op(1.0), 0, [("norm", 1.0)]),
        ("border", Op(2.0), 0, [("border", 2.0), ("norm", 1.0)]),
        ("norm", Op(3.0, fails=True), 1, [("border", 2.0), ("norm", 3.0)]),
    ]:
        monkeypatch.setattr(runner.importlib, "import_module", lambda _, op=op: op)
        monkeypatch.setattr(sys, "argv", ["ops", name, "--out", str(out)])
        assert runner.main() == code
        assert measured() == (2, want)
        assert (f"FAILED: {name}" in capsys.readouterr().out) == bool(code)
    facts["cores"] = 4
    monkeypatch.setattr(runner.importlib, "import_module", lambda _: Op(4.0))
    assert runner.main() == 0
    assert measured() == (4, [("norm", 4.0)])


def test_the_machine_is_described():
    runner = importlib.import_module("benchmarks.ops.__main__")
    facts = runner.machine()
    assert {"date", "device", "gpu", "python", "versions"} <= set(facts)
    assert {"torch", "triton"} <= set(facts["versions"])
    json.dumps(facts)
