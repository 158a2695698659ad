"""What one call of ``optimize`` holds, and how a region is called through its captured graph."""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as _config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ..errors import OptimizeError
from ..graph.printer import dump, source
from ..memory.oom_retry import is_out_of_memory
from ..memory.planner import Planner
from ..rewrite.engine import Fuel
from ..rewrite.findings import Finding
from ..rewrite.verify import Verifier
from . import codegen
from .options import Environment, Options
from .sharing import Shared, Sharing, Stage
from .watch import Watches


@dataclass(eq=False)
class Captured:
    """One captured graph.

    Attributes:
        findings: what the rules did in it.
        grad: whether it was captured with gradients enabled.
        frame: number of the capture, for dumps and order.
        before: its code as it was captured, if the session keeps it; else empty.
        after: its code as it runs, likewise.
    """

    findings: list[Finding]
    grad: bool
    frame: int
    before: str = ""
    after: str = ""


def representative(graphs: list[Captured]) -> Captured | None:
    """The graph that speaks for a module: its last one with gradients, else its last one."""
    ranked = sorted(graphs, key=lambda g: (g.grad, bool(g.findings), g.frame))
    return ranked[-1] if ranked else None


@dataclass(eq=False)
class Session:
    """What one ``optimize`` call holds: choices, verdicts, graphs, and who runs which graph.

    Attributes:
        options: the user's choices.
        environment: the environment variables.
        codegen: ``(choice, reason)`` for the blocks.
        verifier: verdicts, shared by all graphs.
        fuel: rewrites left.
        planner: says what each block keeps for backward.
        runs: module -> the graphs that it has run.
        notes: module -> reasons why calls of it ran as they were.
        failed: module -> why it could not be captured; it runs as it was from then on.
        split: called with a module that could not be captured: makes regions of its parts, and
            returns what undoes that.
        current: the module whose region is being called.
        shared: the function that it runs.
        sharing: which modules share a function.
        outer_compile: whether somebody's torch.compile has traced the model as it was.
        head_active: whether the call at hand came through a captured head.
        preparation: what Inductor needs first, found in the background.
        retired: modules that were restored; a forward of theirs that others have wrapped is idle.
        watches: what lies below each region, and whether it has changed.
        keeps_code: whether each graph's code is kept beside it, for people to read.
    """

    options: Options
    environment: Environment
    codegen: tuple[str, str]
    verifier: Verifier
    fuel: Fuel
    planner: Planner
    runs: weakref.WeakKeyDictionary[nn.Module, list[Captured]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    notes: weakref.WeakKeyDictionary[nn.Module, dict[str, None]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    failed: weakref.WeakKeyDictionary[nn.Module, str] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    split: Callable[[nn.Module, Session], Callable[[], None]] = lambda m, s: lambda: None
    current: nn.Module | None = None
    shared: Shared | None = None
    sharing: Sharing = field(default_factory=Sharing)
    outer_compile: bool = False
    head_active: bool = False
    preparation: threading.Thread | None = None
    retired: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    watches: Watches = field(default_factory=Watches)
    keeps_code: bool = False
    _called: bool = False
    _failures: dict[Any, str] = field(default_factory=dict)

    def compiled(
        self, module: nn.Module, key: Any, kind: str, make: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """The compiled form of ``module``'s function; modules that share the function share it.

        Those that keep different things for backward do not. The one that was made before there was
        a plan belongs to the level that the plan gave it.
        """
        *source, level = key
        if kind == "block" and level == self.planner.first:
            level = None
        self.shared = shared = self.sharing.find(module, (*source, level, kind))
        if shared.stage is Stage.OWN and shared.full:
            raise TooManyGraphs("each call needs a graph of its own")
        if shared.function is None:
            shared.function = make()
        return shared.function

    def call(
        self,
        module: nn.Module,
        compiled: Callable[[], Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plain: Callable[[], Any],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Any:
        """Call ``module`` through its captured graph; through ``plain`` if capture fails.

        In a block or norm nothing has run when capture fails; in a head the backbone may have, and
        runs once more, this one time. An error of the model's own code comes out of ``plain``
        again, as it would have without us.

        Args:
            module: the region.
            compiled: makes, or finds, what runs its graph.
            args: for the graph.
            kwargs: for the graph.
            plain: the same call as it was, without arguments.
            around: makes what surrounds the captured call, and only that.
        """
        if not self._called and self.codegen[0] == "inductor":
            self.preparation = codegen.prepare(module)
        self._called = True
        previous = self.current, self.shared
        self.current = module
        try:
            run = compiled()
            with around(), _numbers(self.shared):
                return run(module, *args, **kwargs)
        except Exception as error:
            cause = getattr(error, "inner_exception", None)
            # no plan fits, or no memory to verify and compile: said to the user, or tried again
            if cause is not None and (isinstance(cause, OptimizeError) or is_out_of_memory(cause)):
                raise cause from None
            if not _is_of_capture(error):
                raise
            reason = f"could not be captured: {_first_line(error)}"
            one_off = isinstance(error, (FailOnRecompileLimitHit, TooManyGraphs))
        finally:
            self.current, self.shared = previous
        join = self.split(module, self)
        try:
            result = plain()
        except BaseException:  # the model's own, of a wrong argument: nothing is said about capture
            join()
            raise
        if not one_off:
            self._failures[_structure(module)] = f"a block that is made alike {reason}"
        self._give_up(module, reason)
        return result

    def failure(self, module: nn.Module) -> str | None:
        """Why ``module``, or another one made of the same parts, could not be captured."""
        reason = self.failed.get(module)
        if reason is None and self._failures and module not in self.runs:
            reason = self._failures.get(_structure(module))
            if reason is not None:
                self.split(module, self)
                self._give_up(module, reason)
        return reason

    def _give_up(self, module: nn.Module, reason: str) -> None:
        self.failed[module] = reason
        self.note(module, reason)

    def note(self, module: nn.Module, reason: str) -> None:
        """Remember why ``module`` ran as it was."""
        self.notes.setdefault(module, {})[reason] = None

    def record(self, graph: Captured) -> None:
        """Remember that the current module ran ``graph``."""
        if self.current is not None:
            known = self.runs.setdefault(self.current, [])
            if not known or known[-1] is not graph:
                if graph in known:
                    known.remove(graph)
                known.append(graph)

    def shown(self, module: fx.GraphModule, frame: int, kind: str, stage: str) -> str:
        """A graph's code, also written to the dump folder; empty when nobody asked for it."""
        folder = self.environment.dump
        if folder is None and not self.keeps_code:
            return ""
        code = source(module, frame, kind, stage)
        if folder is not None:
            dump(folder, code, frame, kind, stage)
        return code if self.keeps_code else ""

    @property
    def rules(self) -> list[Any]:
        """The rules that are not disabled by the environment."""
        return [r for r in self.options.passes if r.name not in self.environment.disable]


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What tells two layers apart that run different code: their parts, switches and kinds.

    Numbers are left out: each layer has its own index.
    """
    return tuple(
        (name, type(m), *sorted((k, v) for k, v in vars(m).items() if isinstance(v, (bool, str))))
        for name, m in module.named_modules()
    )


class TooManyGraphs(TorchDynamoException):
    """A module that needs a new graph for each call."""


_LIMIT = 1024
"""Dynamo's own limit of recompilations; ``sharing`` has stricter ones, and ways out."""


@contextmanager
def _numbers(shared: Shared | None) -> Iterator[None]:
    """Say what Dynamo does, should it capture, with numbers that stand in modules.

    It does without its cache of fake tensors: where sizes are symbolic, making the entries takes
    about a third of a capture of small models, and one call in seven finds one (2026-11-26,
    torch 2.13).

    Args:
        shared: at its stage ``VARYING``, those become inputs in which two calls differ; otherwise
            all are constants (an eps, a scale, the size of a head).
    """
    varying = shared is not None and shared.stage is Stage.VARYING
    before = _config.specialize_float, _config.recompile_limit, _config.fake_tensor_cache_enabled
    _config.specialize_float, _config.fake_tensor_cache_enabled = not varying, False
    _config.recompile_limit = max(_LIMIT, before[1])
    integers = _config.allow_unspec_int_on_nn_module
    if varying:
        _config.allow_unspec_int_on_nn_module = True
    try:
        yield
    finally:
        _config.specialize_float, _config.recompile_limit = before[:2]
        _config.fake_tensor_cache_enabled = before[2]
        if varying:
            _config.allow_unspec_int_on_nn_module = integers


def _is_of_capture(error: Exception) -> bool:
    """Whether Dynamo raised it: by its class, or by where it was raised."""
    if isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit)):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = frame.tb_frame.f_code.co_filename if frame is not None else ""
    return where.startswith(_DYNAMO)


_DYNAMO = os.path.dirname(torch._dynamo.__file__)


def _first_line(error: Exception) -> str:
    """What an error says first, and the two innermost places of the user's code it points to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error))[-2:]
    where = " < ".join(
        f"{'/'.join(path.replace(os.sep, '/').split('/')[-2:])}:{line}"
        for path, line in places[::-1]
    )
    text = f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
    return f"{text} (at {where})" if where else text
