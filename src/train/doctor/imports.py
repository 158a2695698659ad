"""Whether the libraries that training needs can be imported, and which one is at fault."""

from __future__ import annotations

import importlib
import sys

from ...packages import install
from .result import CheckResult, reason

NEEDED = {
    "torch": "torch",
    "torch._dynamo": "torch",
    "transformers.trainer": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "datasets": "datasets",
}
"""The modules that every run imports, and the package of each."""

_PACKAGES = {"yaml": "pyyaml", "flash_attn": "flash-attn"}
"""Module -> its package, where that has another name."""

OPTIONAL = ("triton", "bitsandbytes", "flash_attn", "xformers", "deepspeed")
"""Modules that can also be removed if nothing else helps: training works without them."""

_NO_LIBRARIES = ("", "fusewright", "__main__")
"""Modules whose errors are not those of a library."""


def try_import(module: str) -> list[CheckResult]:
    """Import one of ``NEEDED``; if that fails, report the library that failed."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library raises anything
        return [broken(f"import {module}", NEEDED[module], error, needed=True)]
    return [CheckResult(f"import {module}", "works")]


def broken(name: str, package: str, error: BaseException, needed: bool = False) -> CheckResult:
    """The result of a check that failed because a library cannot be imported.

    The library at fault is ``package``, unless the error shows another one.
    """
    error = first_cause(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        mend = install(_PACKAGES.get(missing, missing))
        return CheckResult(name, "fails", "missing", reason(error), mend, needed)
    module = culprit(error) or package
    note = f"importing {_PACKAGES.get(module, module)} raises {reason(error)}"
    return CheckResult(name, "fails", "broken", note, reinstall(module), needed)


def reinstall(module: str) -> str:
    """The command that installs the package of a module again."""
    package = _PACKAGES.get(module, module)
    mend = f"pip install --force-reinstall {package}"
    if module in OPTIONAL:
        mend += f", or remove it, since it is optional: pip uninstall {package}"
    return mend


def first_cause(error: BaseException) -> BaseException:
    """The error that led to this one: libraries that import others raise their own."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def culprit(error: BaseException) -> str | None:
    """The library in which an error was raised."""
    library, trace = None, error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in _NO_LIBRARIES and name not in sys.stdlib_module_names:
            library = name
        trace = trace.tb_next
    return library
