"""The log of one session: the graphs that were captured, and why other calls ran the original."""

from __future__ import annotations

import itertools
import os
import re
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..graph import printer
from ..rewrite.findings import Finding
from .logits.reads import Reads
from .sharing import SharedFunctions

_numbers = itertools.count(1)


@dataclass(eq=False)
class CapturedGraph:
    """One captured graph; its code ``before`` and ``after`` the rules is kept only on request."""

    findings: list[Finding]
    grad: bool
    number: int
    before: str = ""
    after: str = ""


def representative(graphs: list[CapturedGraph]) -> CapturedGraph | None:
    """The graph that speaks for a module: its last one with gradients, else its last one."""
    ranked = sorted(graphs, key=lambda g: (g.grad, bool(g.findings), g.number))
    return ranked[-1] if ranked else None


class StageLog:
    """Shows one graph after each stage of its compilation."""

    def __init__(self, kind: str, folder: str | None, keep: bool) -> None:
        """Make one for a new graph; ``keep``: its code is kept for people to read."""
        self.number = next(_numbers)
        self._kind, self._folder, self._keep = kind, folder, keep
        self._shown = ""
        self._code: dict[str, str] = {}

    def show(self, graph: fx.GraphModule, stage: str) -> None:
        """Dump the graph after a stage that has changed it, and as it is captured and runs."""
        is_end = stage in _ENDS
        if self._folder is None and not (is_end and self._keep):
            return
        code = printer.source(graph, self.number, self._kind, stage)
        if is_end and self._keep:
            self._code[stage] = code
        if self._folder is not None and (is_end or _body(code) != self._shown):
            self._shown = _body(code)
            printer.dump(self._folder, code, self.number, self._kind, stage)

    @property
    def code(self) -> tuple[str, str]:
        """The code as captured and as it runs; empty when nobody asked for it."""
        before, after = (self._code.get(stage, "") for stage in _ENDS)
        return before, after


_ENDS = "captured", "rewritten"


def _body(code: str) -> str:
    """The code without its first line, which names the stage."""
    return code.partition("\n")[2]


@dataclass(eq=False)
class GraphLog:
    """The graphs of one session, and the calls that ran without one."""

    # module -> the graphs that it has run
    graphs: weakref.WeakKeyDictionary[nn.Module, list[CapturedGraph]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    # module -> reasons why calls of it ran the original, and whether that is faster
    notes: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    # module -> why it could not be captured; it runs the original from then on
    failed: weakref.WeakKeyDictionary[nn.Module, str] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    # the structure of such a module -> why others like it are not captured
    failed_structures: dict[Any, str] = field(default_factory=dict)
    functions: SharedFunctions = field(default_factory=SharedFunctions)
    # modules that were restored; a forward of theirs that others have wrapped is idle
    restored: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    outer_compile: bool = False  # whether somebody's torch.compile has traced the original model
    keeps_code: bool = False  # whether each graph's code is kept with it, for people to read
    reads: Reads = field(default_factory=Reads)

    def record(self, module: nn.Module, graph: CapturedGraph) -> None:
        """Remember that ``module`` ran ``graph``."""
        graphs = self.graphs.setdefault(module, [])
        if not graphs or graphs[-1] is not graph:
            if graph in graphs:
                graphs.remove(graph)
            graphs.append(graph)

    def note(self, module: nn.Module, reason: str, faster: bool = False) -> None:
        """Remember why ``module`` ran the original; ``faster``: because that was faster."""
        self.notes.setdefault(module, {})[reason] = faster

    def fail(self, module: nn.Module, reason: str) -> None:
        """Remember why ``module`` is no longer captured; forget the graphs that it has run."""
        self.failed[module] = reason
        self.graphs.pop(module, None)
        self.note(module, reason)

    def note_outer_compile(self) -> None:
        """Remember that somebody's torch.compile has traced the original model."""
        self.outer_compile = True

    def keep_code(self) -> None:
        """Keep the code of every graph that is captured from now on."""
        self.keeps_code = True

    def has_run(self, module: nn.Module) -> bool:
        """Whether ``module`` was called: through a graph or not."""
        return module in self.graphs or module in self.notes


def summary(error: Exception) -> str:
    """What an error says first, and the two innermost places of the user's code it points to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = list(dict.fromkeys(re.findall(r'File "([^"]+)", line (\d+)', str(error))))[-2:]
    where = " < ".join(
        f"{'/'.join(path.replace(os.sep, '/').split('/')[-2:])}:{line}"
        for path, line in places[::-1]
    )
    text = f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
    return f"{text} (at {where})" if where else text
