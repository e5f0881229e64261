"""The public surface: what it holds, and that it stays instant to import."""

import json
import subprocess
import sys

import pytest

import gazelle
from gazelle.base.errors import DataError, OptionError, UserError, nearest, shorten


def test_every_public_name_resolves() -> None:
    assert [name for name in gazelle.__all__ if getattr(gazelle, name, None) is None] == []
    assert dir(gazelle) == gazelle.__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="FastLanguageModle"):
        gazelle.FastLanguageModle  # noqa: B018


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "pydantic", "matplotlib", "bitsandbytes", "accelerate"}


def test_import_is_light() -> None:
    assert loaded_by("import gazelle") & (HEAVY | {"rich", "typer", "psutil"}) == set()


def test_help_is_light() -> None:
    assert loaded_by("from gazelle.__main__ import main\nassert main(['--help']) == 0") & HEAVY == set()


def test_errors_say_what_where_found_expected_and_what_to_do() -> None:
    error = DataError("the answer is empty", where="rows.jsonl, line 3", found="", expected="text", fix="fill it in")
    assert str(error).splitlines() == [
        "rows.jsonl, line 3: the answer is empty", "  expected: text", "  to do:    fill it in"]
    assert error.exit_code == 2
    assert isinstance(error, UserError) and isinstance(error, ValueError)


def test_errors_survive_a_trip_between_processes() -> None:
    import pickle

    error = OptionError("no such option", where="train.lr", found="lr", expected="learning_rate", fix="rename it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is OptionError
    assert str(copy) == str(error)


def test_nearest_and_shorten() -> None:
    assert nearest("learning_rat", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert nearest("zzz", ["b", "a"]) == "use one of: a, b"
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 200) == "x" * 159 + "…"
