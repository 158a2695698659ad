"""Capturing a region's forward with TorchDynamo, and calling what its graphs were compiled to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ..memory.oom_retry import is_out_of_memory
from .backend import compile_graph
from .calls.input_gradients import with_leaf
from .graph_log import CapturedGraph, StageLog
from .session import Session
from .sharing import CaptureError, InputGradient
from .unit import CallInfo, Run, Unit


def captured(function: Callable[..., Any], session: Session, kind: str) -> Callable[..., Any]:
    """``torch.compile`` of ``function``, with what ``Session.capturing`` sets for each capture."""
    # to set it around each call would take as long as to find the graph
    context: Any = torch._dynamo.optimize(_backend(session, kind), nopython=kind != "head")
    convert = context.callback

    @functools.wraps(convert)  # with its attributes: TorchDynamo finds the backend by them
    def capture(*args: Any, **kwargs: Any) -> Any:
        with session.capturing():
            try:
                return convert(*args, **kwargs)
            except Exception as error:
                if _is_known(error):
                    raise
                raise CaptureError(error) from error

    context.callback = capture
    run: Callable[..., Any] = context(function)
    if kind == "head":  # which has other code than that of its graphs, and errors of it
        return run

    def run_whole(*args: Any, **kwargs: Any) -> Any:
        state = session.state
        state.has_run = False
        try:
            return run(*args, **kwargs)
        except Exception as error:
            if state.has_run or _is_known(error):
                raise
            raise CaptureError(error) from error

    return run_whole


def _is_known(error: Exception) -> bool:
    """True for errors of a capture that are re-raised unchanged."""
    # guards are made in other packages of PyTorch, which raise what they happen to raise
    refused = isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))
    return refused or is_out_of_memory(error)


def _backend(session: Session, kind: str) -> Callable[[fx.GraphModule, list[Any]], Run]:
    """The TorchDynamo backend of one kind of region."""

    def fusewright(graph: fx.GraphModule, examples: list[Any]) -> Run:
        state = session.state
        if kind == "head" and state.region is not None:
            state.watches.watch_inlined(state.region)
        unit = _unit(graph, examples, session, kind)
        arguments = [n.meta.get("grapharg") for n in graph.graph.find_nodes(op="placeholder")]
        try:
            run = compile_graph(unit)
        except InputGradient:  # the region is captured again, with the input that it was given
            raise
        except BaseException:
            state.count_graph()
            raise
        state.count_graph()
        return _recorded(run, unit, session, [a for a in arguments if a is not None])

    return fusewright  # TorchDynamo's messages name the backend by its function


def _unit(graph: fx.GraphModule, examples: list[Any], session: Session, kind: str) -> Unit:
    """The unit of a graph that was captured in the call at hand."""
    state, choices = session.state, session.choices
    replay = state.replay
    call = CallInfo(
        state.region,
        state.first_input,
        state.no_gradient is not None,
        kind == "head" and replay is not None and not replay.is_labelled,
        session.log.reads,
        state.preparation,
    )
    log = StageLog(kind, choices.environment.dump, session.log.keeps_code)
    return Unit(graph, examples, kind, torch.is_grad_enabled(), call, choices, log)


def _recorded(run: Run, unit: Unit, session: Session, arguments: list[Any]) -> Run:
    """``run``, which notes in the log that the region at hand ran the graph.

    ``arguments`` are TorchDynamo's records of the graph's inputs.
    """
    reason, log = unit.notes.gradient_reason, unit.log
    graph = CapturedGraph(unit.notes.findings, unit.grad, log.number, *log.code)

    def call(*args: Any) -> Any:
        # copies of the graph keep the records, with weak references that torch.utils.swap_tensors
        # refuses. At the first call the capture is over
        while arguments:
            arguments.pop().erase()
        if reason is not None:
            session.state.require_no_leaf(reason)
        session.record(graph)
        x = session.state.no_gradient
        return run(*(args if x is None else with_leaf(args, x)))

    return call
