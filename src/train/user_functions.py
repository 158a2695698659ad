"""Python functions that a recipe names: rewards, or functions that change rows.

They are code of the recipe's author, so none is loaded without the caller's permission
(``consent``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DataError, RecipeError, did_you_mean, first_line
from .consent import Consent, refused_function


def located(name: str, folders: Sequence[Path]) -> str:
    """The name of a function with the absolute path of its file, ``PATH.py:function``.

    ``name`` is ``module.function``, or the path of a file with a colon and the function; it is
    returned as it is where none of ``folders``, best first, has the file: it may be in an installed
    package.
    """
    file, function = _parts(name)
    paths = (folder / Path(file).expanduser() for folder in folders)
    path = next((path for path in paths if path.is_file()), None)
    return name if path is None else f"{path.resolve()}:{function}"


def module_of(name: str) -> str | None:
    """The module of a function, if it is neither in a file nor installed; else None."""
    if ".py:" in name:
        return None if Path(_parts(name)[0]).is_file() else Path(_parts(name)[0]).stem
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) if top != "__main__" else None  # which runs nothing
    except ValueError:  # a module that this process has made, not found
        spec = None
    return None if spec else top


def load_function(name: str, key: str, consent: Consent) -> Callable[..., Any]:
    """Load a function by its name from ``located``; ``key`` is its place in the recipe.

    Raises:
        RecipeError: the caller does not allow it, or there is no such function.
    """
    if not consent.allow_code:
        raise RecipeError(f"{key}: {refused_function(name)}")
    file, function = _parts(name)
    try:
        module = _file_module(Path(file)) if ".py:" in name else _module(name.rpartition(".")[0])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the code does when it is imported
        ended = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else None
        message = ended or first_line(error)
        raise RecipeError(f"{key}: {name} cannot be imported: {message}") from error
    attribute = getattr(module, function, None)
    if not callable(attribute):
        where = Path(file).name if ".py:" in name else module.__name__
        raise RecipeError(f"{key}: {where} has no function {function!r}{_hint(module, function)}")
    loaded: Callable[..., Any] = attribute
    return loaded


def what_failed(error: BaseException, function: Callable[..., Any]) -> str:
    """What a function did, with the line: ``raised KeyError at FILE:3: 'answer'``.

    ``error`` may be ``SystemExit``, which must not end the run in silence. The line is the
    innermost one in the function's file, because the lines of libraries that it calls tell its
    author little.
    """
    file = _file_of(function)
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    at = f" at {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)}){at}"
    return f"raised {type(error).__name__}{at}: {first_line(error)}"


def _hint(module: ModuleType, function: str) -> str:
    """What the module has in place of a missing function."""
    if hasattr(module, function):
        return f": it is of the type {type(getattr(module, function)).__name__}"
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    suggestion = did_you_mean(function, names)
    return f"; {suggestion}" if suggestion else ""


def _file_of(function: Callable[..., Any]) -> str | None:
    """The file of a function, or of a callable object's class; None: unknown."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    if not hasattr(inner, "__code__"):
        inner = getattr(type(inner), "__call__", None)  # noqa: B004  # not whether it has one
    code = getattr(inner, "__code__", None)
    return None if code is None else str(code.co_filename)


def _parts(name: str) -> tuple[str, str]:
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        return file, function
    module, _, function = name.rpartition(".")
    return f"{module.replace('.', '/')}.py", function


def _module(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        return importlib.import_module(name)


def _file_module(path: Path) -> ModuleType:
    """The module in a file, which is imported once, by a name that no other module has."""
    name = f"_of_recipe_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules in ``folder`` be imported, behind all others."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# --- rows that the package makes, so that a recipe can be tried without a download ----------------


PREFIX = "fusewright:"
"""Prefix of the paths of such rows."""

_MAKERS = {
    "docstrings": ("data/readers/docstrings.py", "chats"),
    "docstring_pairs": ("data/readers/docstrings.py", "pairs"),
    "docstring_prompts": ("data/readers/docstrings.py", "prompts"),
}
"""The file that makes the rows of a name, and their form."""


def is_package_rows(path: str) -> bool:
    """Whether a dataset's ``path`` names rows of the package."""
    return path.startswith(PREFIX)


def why_none(path: str) -> str | None:
    """Why there are no rows under this name; None: there are."""
    if path.removeprefix(PREFIX) in _MAKERS:
        return None
    return f"there are no rows {path}; there are {', '.join(PREFIX + name for name in _MAKERS)}"


class PackageRows:
    """The rows of a name such as ``fusewright:docstrings``.

    Another process makes them: what it imports does not stay here.

    Raises:
        DataError: there is no such name, or they cannot be made.
    """

    def __init__(self, path: str) -> None:
        problem = why_none(path)
        if problem is not None:
            raise DataError(problem)
        file, form = _MAKERS[path.removeprefix(PREFIX)]
        maker = Path(__file__).parent / file
        with tempfile.TemporaryDirectory(prefix="fusewright-") as folder:
            rows_file = Path(folder) / "rows.jsonl"
            # -I: neither the current folder nor the environment can put a module in the way
            command = [sys.executable, "-I", str(maker), str(rows_file), form]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                lines = (result.stderr or result.stdout).strip().splitlines()
                raise DataError(
                    f"{path}: cannot be made: {lines[-1] if lines else result.returncode}"
                )
            text = rows_file.read_bytes()
        self._lines = text.splitlines()
        self._fingerprint = hashlib.sha256(text).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Any]:
        return map(json.loads, self._lines)
