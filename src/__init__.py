"""fusewright: an optimizing compiler for Hugging Face decoder models.

from fusewright import optimize, explain, restore

model = optimize(model)    # in place; returns the same object
print(explain(model))      # what was rewritten, what was not, and why
restore(model)             # exactly the original again
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing.audit import audit
    from .auditing.callback import AuditCallback
    from .auditing.findings import Audit, AuditFinding
    from .auditing.watch import watch
    from .compiler.pipeline import explain, optimize, restore
    from .errors import FusewrightError, OptimizeError
    from .optim.flat import FlatOptimizer, flatten_optimizer
    from .report import Report, Site

__version__ = "0.1.0"
__all__ = [
    "Audit", "AuditCallback", "AuditFinding", "FlatOptimizer", "FusewrightError", "OptimizeError",
    "Report", "Site", "audit", "explain", "flatten_optimizer", "optimize", "restore", "watch",
]  # fmt: skip

_HOMES = {
    "audit": "auditing.audit",
    "Audit": "auditing.findings",
    "AuditCallback": "auditing.callback",
    "watch": "auditing.watch",
    "AuditFinding": "auditing.findings",
    "optimize": "compiler.pipeline",
    "explain": "compiler.pipeline",
    "restore": "compiler.pipeline",
    "Report": "report",
    "Site": "report",
    "FusewrightError": "errors",
    "OptimizeError": "errors",
    "FlatOptimizer": "optim.flat",
    "flatten_optimizer": "optim.flat",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use: importing the package alone costs nothing."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except (ImportError, AttributeError) as error:
        from . import upstream

        if (reason := upstream.changed("the compiler")) is not None:
            globals().update(upstream.verbs(reason))
            if name in globals():
                return globals()[name]
            raise ImportError(f"{__name__}.{name} cannot be had: {reason}") from error
        if isinstance(error, ImportError):
            raise
        # would read as "no such name" and hide what is wrong
        raise ImportError(f"{__name__}.{name} could not be loaded: {error}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All names, also those that are not loaded yet: completion and "did you mean" read this."""
    return sorted({*globals(), *__all__})
