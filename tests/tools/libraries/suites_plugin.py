"""A pytest plugin for other libraries' suites: each model is optimized when it is first called.

    pytest -p suites_plugin --optimize eager        # with this folder on PYTHONPATH

``--stand-ins DIR`` gives tests what they load from the hub, see ``stand_ins.py``. With
``--without-cache`` a model makes itself no cache unless a call asks for one.
"""

from __future__ import annotations

import pathlib
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import stand_ins
import torch
from torch import nn

_KNOWN = "_optimized_by_suites_plugin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--optimize", choices=("eager", "inductor"), default=None)
    parser.addoption("--stand-ins", metavar="DIR", default=None)
    parser.addoption("--without-cache", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    """Change the libraries before any test is collected."""
    folder, codegen = config.getoption("--stand-ins"), config.getoption("--optimize")
    if folder is not None:
        stand_ins.install(pathlib.Path(folder))
    if config.getoption("--without-cache"):
        _build_without_cache()
    if codegen is not None:
        config._optimized = []  # type: ignore[attr-defined]
        _optimize_at_first_call(codegen, config._optimized)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many models were optimized: a suite that called none proves nothing."""
    made: list[_Optimized] | None = getattr(config, "_optimized", None)
    if made is not None and not config.getoption("numprocesses", None):  # xdist's workers know
        changed = [m for m in made if m.rewrites]
        line = f"fusewright optimized {len(made)} models, and rewrote {len(changed)} of them"
        terminalreporter.write_line(f"{line} in {sum(m.rewrites for m in changed)} places")
        reasons = Counter(r for m in made if not m.rewrites for r in m.reasons or {"no graph"})
        for reason, times in reasons.most_common():
            terminalreporter.write_line(f"    not rewritten: {times}: {reason}")


@dataclass(eq=False)
class _Optimized:
    """What became of one optimized model: in how many places it was rewritten, or why not."""

    rewrites: int = 0
    reasons: set[str] = field(default_factory=set)

    def count(self, session: Any) -> None:
        graphs = [g for run in list(session.log.graphs.values()) for g in run]
        done = sum(f.status == "rewritten" for g in graphs for f in g.findings)
        self.rewrites = max(self.rewrites, done)
        self.reasons.update(*session.log.notes.values())


def _optimize_at_first_call(codegen: str, made: list[_Optimized]) -> None:
    from fusewright import optimize
    from fusewright.compiler.install import active

    known: weakref.WeakKeyDictionary[nn.Module, tuple[_Optimized, Any]]
    known = weakref.WeakKeyDictionary()  # a session must not outlive its model

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return nn.Module.__call__(self, *args, **kwargs)
        if _KNOWN not in self.__dict__:
            for module in self.modules():
                module.__dict__[_KNOWN] = True
            optimize(self, codegen=codegen)
            found = (record for m in self.modules() if (record := active(m)))
            if (first := next(found, None)) is not None:
                made.append(_Optimized())
                known[self] = made[-1], first.session
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        finally:
            if self in known:
                record, session = known[self]
                record.count(session)

    for kind in _outermost_classes():
        kind.__call__ = call


def _build_without_cache() -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.__init__

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # generation has a configuration of its own

    PreTrainedModel.__init__ = __init__


def _outermost_classes() -> list[Any]:
    """The classes whose instances users call: those of transformers, and PEFT's around them."""
    from transformers import PreTrainedModel

    try:
        from peft import PeftModel
    except ImportError:
        return [PreTrainedModel]
    return [PreTrainedModel, PeftModel]
