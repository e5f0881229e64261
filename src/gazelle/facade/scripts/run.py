"""Runs a script that was written for Unsloth or TRL, as it is."""

import contextlib
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from gazelle.base.errors import GazelleError, OptionError
from gazelle.base.log import logger
from gazelle.facade.scripts.imports import missing_name, standing_in
from gazelle.models.stand_ins import check_datasets, check_models, datasets_standing_in, models_standing_in


def parse_names(given: Sequence[str], option: str) -> dict[str, str]:
    """NAME=PATH pairs as a table.

    Raises:
        OptionError: one without a name or a path, or a name given twice.
    """
    names: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise OptionError("a stand-in needs a name and a path", where=option, found=entry,
                              expected=f"{option} NAME=PATH", fix="write the hub name, an equals sign and the path")
        if name in names:
            raise OptionError("a name is given twice", where=option, found=name, expected="each name once",
                              fix="leave one of them out")
        names[name] = path
    return names


def run_script(script: Path, arguments: Sequence[str] = (), models: Mapping[str, str] | None = None,
               datasets: Mapping[str, str] | None = None) -> int:
    """Run a Python file as its own program would; returns the exit code.

    While it runs, `import unsloth` and `import trl` get gazelle's names, `transformers.TrainingArguments` takes its
    older names, and where torch has no "cuda" it means the device that is there. Afterwards everything is as before.

    Args:
        script: the file; nothing in it is changed.
        arguments: `sys.argv[1:]` for it.
        models: hub name -> folder or GGUF file that stands in for it.
        datasets: hub name -> file or folder that stands in for it.

    Raises:
        UserError: no such script, one that is not Python, a stand-in that is not there, or a name that the script
            imports and gazelle lacks.
    """
    models, datasets = models or {}, datasets or {}
    if not script.is_file() or script.suffix != ".py":
        raise OptionError("there is no such script", where=str(script),
                          found="a file of another kind" if script.exists() else "nothing", expected="a .py file",
                          fix="export the notebook: jupyter nbconvert --to script notebook.ipynb"
                          if script.suffix == ".ipynb" else "check the path")
    _check_syntax(script)
    check_models(models)
    check_datasets(datasets)
    with _as_program(script, arguments), standing_in(), models_standing_in(models) as models_used, \
            datasets_standing_in(datasets) as datasets_used, _environment():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except GazelleError:
            raise
        except ImportError as error:
            if (ours := missing_name(error)) is None:
                return _failed(error, script)
            raise ours from error
        except SystemExit as error:
            return _exit_code(error)
        except Exception as error:  # noqa: BLE001 — whatever the script raised, shown as Python would
            return _failed(error, script)
    for name in sorted({*models, *datasets} - models_used - datasets_used):
        logger.warning("%s was never asked for by the script; the names must be written as they are there.", name)
    return 0


def _check_syntax(script: Path) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):  # those are the run's to give
            compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise OptionError("the script is not valid Python", where=f"{script}{line}", expected="a Python program",
                          found=f"{error.msg}: {error.text.strip()}" if error.text else error.msg,
                          fix="correct that line") from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What a script finds otherwise than without gazelle, beside its imports."""
    from gazelle.facade.scripts.without_gpu import cuda_is_here
    from gazelle.train.older import older_names

    with cuda_is_here(), older_names():
        yield


@contextlib.contextmanager
def _as_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """The script's own arguments, and its folder first where modules are looked for."""
    argv, path, loaded = sys.argv, list(sys.path), set(sys.modules)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path
        for name in set(sys.modules) - loaded:  # modules beside the script: those of the next one may share a name
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().parent == script.resolve().parent:
                del sys.modules[name]


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)  # noqa: T201 — as Python does with sys.exit("message")
    return 1


def _failed(error: BaseException, script: Path) -> int:
    """Show a script's own error with its traceback, from the script on."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != str(script):
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame or error.__traceback__)
    return 1
