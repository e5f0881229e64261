"""The import hook of `gazelle run`: Unsloth's and TRL's names resolve to gazelle's while it is in force.

A finder on `sys.meta_path`, and modules that hold nothing but where each name is to be found. Nothing is installed,
written or rewritten; when the block ends, the modules are taken out again and what was imported before is put back.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from gazelle.base.errors import UserError, nearest
from gazelle.facade.scripts.names import INSTEAD, MODULES, ROOTS


class NotThereError(UserError, ImportError):
    """A name that a script imports and that gazelle does not have. An `ImportError` too, for scripts that try."""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `MODULES`, and makes them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that gazelle stands in for.

        Raises:
            NotThereError: another module of a package that gazelle stands in for.
        """
        if fullname.partition(".")[0] not in ROOTS:
            return None
        if fullname in MODULES:
            return importlib.util.spec_from_loader(fullname, self, origin="gazelle", is_package=True)
        raise _not_there(fullname.rpartition(".")[0], fullname.rpartition(".")[2])

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty module that knows where its names are."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: names are imported when they are asked for."""


class _Module(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name, f"gazelle in place of {name}.")
        self.__all__ = sorted(MODULES[name])

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("gazelle").__version__
        if name in MODULES[self.__name__]:
            home, _, attribute = MODULES[self.__name__][name].partition(":")
            value = getattr(importlib.import_module(home), attribute)
            setattr(self, name, value)
            return value
        if name in INSTEAD:
            raise _not_there(self.__name__, name)
        # Not ours to say more of: some libraries ask every module there is for a name. `missing_name` speaks later.
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return self.__all__


def _not_there(module: str, name: str) -> NotThereError:
    known = MODULES.get(module, {})
    fix = f"use {INSTEAD[name]}" if name in INSTEAD else nearest(name, known or ROOTS)
    return NotThereError(f"gazelle has no {name}", where=f"from {module} import {name}", found=name,
                         expected="a name that gazelle has" + (": " + ", ".join(sorted(known)) if known else ""),
                         fix=fix)


def missing_name(error: ImportError) -> UserError | None:
    """What to say of a failed `from trl import Something`; None if it is about another package."""
    module = error.name or ""
    if module.partition(".")[0] not in ROOTS:
        return None
    name = str(error).partition("cannot import name ")[2].partition("'")[2].partition("'")[0]
    return _not_there(module, name or module)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """While it lasts, imports of Unsloth and TRL get gazelle's names."""
    def ours(name: str) -> bool:
        return name.partition(".")[0] in ROOTS

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
