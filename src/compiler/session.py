"""What one call of ``optimize`` holds, and how a region is called through its captured graph."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as _config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ..errors import OptimizeError
from ..memory.oom_retry import is_out_of_memory
from ..memory.random_state import RandomState
from .choices import Choices
from .codegen.cpp_compiler import prepare
from .graph_log import CapturedGraph, GraphLog, summary
from .regions import first_tensor
from .segments import StepSegments
from .sharing import (
    CaptureError,
    InputGradient,
    SharedFunction,
    Stage,
    structure,
)
from .units import Units
from .watch import Watches

_logger = logging.getLogger(__name__)


class Replay:
    """One call of a captured head: what runs is noted, and given again should the capture fail.

    The backbone, or the first of the blocks, may have run by then. The original code is given what
    they have returned, and finds the random numbers as they have left them: nothing runs, counts,
    writes or draws twice.

    """

    def __init__(self, device: torch.device, is_labelled: bool = True) -> None:
        """Note the random numbers of ``device`` and of the host."""
        self.is_on, self.is_labelled = False, is_labelled
        self._start = RandomState.now(device)
        self._ran: list[tuple[nn.Module, Any, RandomState]] = []

    def note(self, module: nn.Module, results: Any) -> None:
        """A part of the head has run."""
        now = RandomState.now(self._start.device)
        self._ran.append((module, results, now))

    def start(self) -> None:
        """The original code runs from here on."""
        self.is_on = True
        self._ran.reverse()
        self._start.restore()

    def take(self, module: nn.Module) -> tuple[Any] | None:
        """What ``module`` has returned, in a tuple; None if it has not run."""
        if not self._ran or self._ran[-1][0] is not module:
            self._ran.clear()
            return None
        _, results, after = self._ran.pop()
        after.restore()
        return (results,)


@dataclass(eq=False)
class CallState:
    """The state of the call at hand, and what a call leaves for the next one."""

    # the module whose region is being called; ``function`` is the one that it runs
    region: nn.Module | None = None
    function: SharedFunction | None = None
    # tells TorchDynamo which sizes of its arguments vary, should it be captured
    mark: Callable[[], None] | None = None
    in_head: bool = False  # whether the call came through a captured head
    units: Units | None = None  # those of its modules whose parameters are sharded
    replay: Replay | None = None  # what the head at hand has run
    # makes the caches that the head at hand returns raise an error when they are used
    on_return: list[Callable[[], None]] = field(default_factory=list)
    segments: StepSegments = field(default_factory=StepSegments)
    watches: Watches = field(init=False)
    # the first input of the block at hand, in whose place its graph gets a leaf
    no_gradient: Tensor | None = None
    first_input: Tensor | None = None  # of the call at hand
    without_leaf: set[type] = field(default_factory=set)  # the blocks that do something else then
    has_run: bool = False  # whether a graph of the region at hand has begun to run
    started: bool = False
    # what Inductor needs first, found in the background since the first call
    preparation: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.watches = Watches(self.segments.slot)

    def replayed(self, module: nn.Module) -> tuple[Any] | None:
        """What ``module`` has returned in this call of a head whose capture failed, in a tuple."""
        replay = self.replay
        return replay.take(module) if replay is not None and replay.is_on else None

    def count_graph(self) -> None:
        """Count a graph that was captured for the function at hand."""
        if self.function is not None:
            self.function.graphs += 1

    def require_no_leaf(self, reason: str) -> None:
        """Raise ``InputGradient``, with the reason, if the graph of this call gets a leaf."""
        if self.no_gradient is not None:
            raise InputGradient(reason)


@dataclass(frozen=True)
class Capture:
    """A call of a region by its captured graph.

    ``compiled`` makes, or finds, what runs the graph. ``mark`` is called before a capture: it tells
    TorchDynamo which sizes vary.
    """

    compiled: Callable[[], Callable[..., Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mark: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class Session:
    """The state of one ``optimize`` call; calls regions through their graphs.

    ``split``, called with a module that could not be captured, makes regions of its parts, and
    returns what undoes that.
    """

    choices: Choices
    log: GraphLog = field(default_factory=GraphLog)
    state: CallState = field(default_factory=CallState)
    split: Callable[[nn.Module, Session], Callable[[], None]] = lambda m, s: lambda: None

    def compiled(
        self, module: nn.Module, key: Any, kind: str, make: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """The compiled form of ``module``'s function; modules that share the function share it."""
        # Modules that keep different things for backward do not. A function that was compiled
        # before there was a plan belongs to the level that the plan gave it.
        *source, level = key
        if kind == "block" and level == self.choices.planner.first:
            level = None
        shared = self.log.functions.find(module, (*source, level, kind))
        self.state.function = shared
        if shared.stage is Stage.OWN and shared.is_full:
            raise TooManyGraphs("each call needs a graph of its own")
        if shared.compiled is None:
            shared.compiled = make()
        return shared.compiled

    def call(
        self,
        module: nn.Module,
        capture: Capture,
        original: Callable[[], Any],
        context: Callable[[Any], AbstractContextManager[None]] = nullcontext,
        no_gradient: Tensor | None = None,
    ) -> Any:
        """Call ``module`` through its captured graph; through ``original`` if capture fails.

        In a block or norm nothing has run when capture fails; what has in a head is replayed. An
        error of the model's own code comes out of ``original`` again, as it would have without us.

        ``original`` is the same call of the original forward. ``context`` makes what surrounds the
        captured call, and only that, of ``no_gradient``, an input in whose place a leaf is tried
        first.
        """
        args, kwargs = capture.args, capture.kwargs
        state = self.state
        if not state.started:
            self._start(module)
        outer = (
            state.region, state.function, state.mark, state.no_gradient, state.first_input,
            state.has_run,
        )  # fmt: skip
        state.region, state.mark, state.no_gradient = module, capture.mark, no_gradient
        state.first_input = first_tensor(args, kwargs)
        try:
            run = capture.compiled()
            with context(no_gradient):
                return run(module, *args, **kwargs)
        except Exception as error:
            cause = getattr(error, "inner_exception", None)
            # no plan fits, or no memory to verify and compile: said to the user, or tried again
            if cause is not None and (isinstance(cause, OptimizeError) or is_out_of_memory(cause)):
                raise cause from None
            if not isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit)):
                raise
            text = summary(error.error if isinstance(error, CaptureError) else error)
            reason = f"could not be captured: {text}"
            one_off = isinstance(error, (FailOnRecompileLimitHit, TooManyGraphs))
        finally:
            (
                state.region, state.function, state.mark, state.no_gradient, state.first_input,
                state.has_run,
            ) = outer  # fmt: skip
        if no_gradient is not None:
            state.without_leaf.add(type(module))
            return self.call(module, capture, original, context)
        undo_split = self.split(module, self)
        try:
            result = original()
        except BaseException:  # the model's own, of a wrong argument: nothing is said about capture
            undo_split()
            raise
        if self.choices.options.strict:
            undo_split()
            raise OptimizeError(f"strict=True, and {type(module).__name__} {reason}")
        if not one_off:
            self.log.failed_structures[structure(module)] = f"a block that is made alike {reason}"
        self.log.fail(module, reason)
        return result

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While TorchDynamo captures a part of the region at hand."""
        if self.state.mark is not None:
            self.state.mark()
        with _dynamo_settings(self.state.function):
            yield

    def leave(self, module: nn.Module, reason: str) -> None:
        """Leave ``module`` to its original code from now on, and capture the parts of it."""
        self.split(module, self)
        self.log.fail(module, reason)

    def failure(self, module: nn.Module) -> str | None:
        """Why ``module``, or another one made of the same parts, could not be captured."""
        log = self.log
        reason = log.failed.get(module)
        if reason is None and log.failed_structures and module not in log.graphs:
            reason = log.failed_structures.get(structure(module))
            if reason is not None:
                self.split(module, self)
                log.fail(module, reason)
        return reason

    def record(self, graph: CapturedGraph) -> None:
        """Remember that the region at hand runs ``graph``."""
        self.state.has_run = True
        if self.state.region is not None:
            self.log.record(self.state.region, graph)

    def _start(self, module: nn.Module) -> None:
        """Before the first call: announce it; let Inductor prepare during the capture."""
        codegen, reason = self.choices.codegen
        _logger.info(
            "the first call captures the model's graphs, in training verifies rewrites%s, and "
            "takes longer than later ones (codegen %s: %s)",
            " and compiles" if codegen == "inductor" else "", codegen, reason,
        )  # fmt: skip
        if self.choices.codegen[0] == "inductor" and not self.choices.fake:
            self.state.preparation = prepare(module)
        self.state.started = True


class TooManyGraphs(TorchDynamoException):
    """A module that needs a new graph for each call."""


_LIMIT = 1024
"""Dynamo's own limit of recompilations; ``sharing`` has stricter ones, and ways out."""


@contextmanager
def _dynamo_settings(shared: SharedFunction | None) -> Iterator[None]:
    """Set how Dynamo, should it capture, treats the numbers in modules."""
    # those in which two calls differ become inputs; otherwise all are constants (an eps, a scale,
    # the size of a head)
    varying = shared is not None and shared.stage is Stage.VARYING
    # Without its cache of fake tensors: where sizes are symbolic, making the entries takes about a
    # third of a capture of small models, and one call in seven finds one (2026-11-26, torch 2.13).
    before = (
        _config.specialize_float, _config.recompile_limit, _config.fake_tensor_cache_enabled,
        _config.use_numpy_random_stream,
    )  # fmt: skip
    _config.specialize_float, _config.fake_tensor_cache_enabled = not varying, False
    # else NumPy's random numbers would be drawn from PyTorch's generator
    _config.use_numpy_random_stream = True
    _config.recompile_limit = max(_LIMIT, before[1])
    integers = _config.allow_unspec_int_on_nn_module
    if varying:
        _config.allow_unspec_int_on_nn_module = True
    # else TorchDynamo keeps weak references to parameters, which swap_tensors refuses
    keeps = getattr(_config, _WEAK, False)  # 2026-11-29: PyTorch 2.11 has no such setting
    if keeps is None:
        setattr(_config, _WEAK, True)
    try:
        with _without_names():
            yield
    finally:
        if keeps is None:
            setattr(_config, _WEAK, None)
        _config.specialize_float, _config.recompile_limit = before[:2]
        _config.fake_tensor_cache_enabled, _config.use_numpy_random_stream = before[2:]
        if varying:
            _config.allow_unspec_int_on_nn_module = integers


_WEAK = "invalidate_compile_context_weakrefs"


@contextmanager
def _without_names() -> Iterator[None]:
    """While TorchDynamo captures in this thread, let it find no names that nothing reads."""
    # Of each module that it meets, the whole model for one, it lists all parameters for the sake of
    # ``torch.export``; and it tokenizes whole source files for lines of a log that is off. Together
    # a sixth of a first step whose code is found in the caches (2026-12-01, torch 2.13).
    logs, this_thread = torch._logging._internal.log_state, threading.get_ident()
    is_logged = any(map(logs.is_artifact_enabled, ("trace_call", "trace_source")))
    finders = _finders_of_names()[: 1 if is_logged else None]

    def in_other_threads(find: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return None if threading.get_ident() == this_thread else find(*args, **kwargs)

        return run

    for owner, name, find in finders:
        setattr(owner, name, in_other_threads(find))
    try:
        yield
    finally:
        for owner, name, find in finders:
            setattr(owner, name, find)


@functools.cache
def _finders_of_names() -> list[tuple[Any, str, Callable[..., Any]]]:
    """The owner and the name of each function, and itself, as PyTorch has it."""
    from torch._dynamo import output_graph, symbolic_convert

    places = (
        (output_graph.OutputGraph, "add_fqn_info_for_inlined_modules"),
        (symbolic_convert, "get_funcname"),
    )
    return [(o, name, vars(o)[name]) for o, name in places if name in vars(o)]
