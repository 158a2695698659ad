"""Python functions that a recipe names: they judge completions, or change rows.

They are code of the recipe's author, so that none is loaded without the caller's permission
(``consent``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import RecipeError, first_line
from .consent import Consent, refused_function


def located(name: str, folders: Sequence[Path]) -> str:
    """The name of a function with the absolute path of its file, ``PATH.py:function``.

    Args:
        name: ``module.function``, or the path of a file with a colon and the function.
        folders: where the file may be, best first.

    Returns:
        That name; or ``name`` as it is, where no folder has the file: it may be in an installed
        package.
    """
    file, function = _parts(name)
    found = (folder / Path(file).expanduser() for folder in folders)
    path = next((path for path in found if path.is_file()), None)
    return name if path is None else f"{path.resolve()}:{function}"


def module_of(name: str) -> str | None:
    """The module of a function, if it is neither in a file nor installed; else None."""
    if ".py:" in name:
        return None if Path(_parts(name)[0]).is_file() else Path(_parts(name)[0]).stem
    top = name.partition(".")[0]
    try:
        found = importlib.util.find_spec(top) if top != "__main__" else None  # which runs nothing
    except ValueError:  # a module that this process has made, not found
        found = None
    return None if found else top


def load_function(name: str, key: str, consent: Consent) -> Callable[..., Any]:
    """Load a function.

    Args:
        name: of the function, as ``located`` returns it.
        key: where in the recipe it is, for messages.
        consent: what the caller allows.

    Raises:
        RecipeError: the caller does not allow it, or there is no such function.
    """
    if not consent.allow_code:
        raise RecipeError(f"{key}: {refused_function(name)}")
    file, function = _parts(name)
    try:
        module = _file_module(Path(file)) if ".py:" in name else _module(name.rpartition(".")[0])
    except Exception as error:  # whatever the code does when it is imported
        raise RecipeError(f"{key}: {name} cannot be imported: {first_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        where = Path(file).name if ".py:" in name else module.__name__
        raise RecipeError(f"{key}: {where} has no function {function!r}")
    loaded: Callable[..., Any] = found
    return loaded


def _parts(name: str) -> tuple[str, str]:
    """The file and the function of a name."""
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
