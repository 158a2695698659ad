"""The TorchDynamo backend: a captured graph in, the optimized callable out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.cleanup import remove_noops
from ..graph.facts import nested
from ..graph.functionalize import remove_writes, require_marked_writes
from ..graph.opaque.functions import is_leaf
from ..graph.run import eager
from ..kernels.cost import saved_by_hook
from ..memory.apply_plan import offloaded, planned
from ..memory.levels import accumulates_twice, draws_in_vain, writes_into_inputs
from ..rewrite.copies import copy_what_is_written
from ..rewrite.engine import apply
from ..rewrite.findings import Finding
from ..rewrite.op_table import TABLE
from ..rewrite.verify import quiet_randomness
from .calls.caller_writes import inputs_to_copy, may_write, with_changed_inputs
from .calls.input_gradients import (
    input_gradient_reason,
    inputs_without_gradient,
    require_gradients,
    with_leaf,
)
from .codegen.absent_gradients import AbsentGradients
from .codegen.inductor import inductor
from .codegen.reach import inputs_of_outputs
from .graph_log import CapturedGraph, StageLog
from .logits.deferral import copy_if_loss, defer_logits
from .session import Choices, Session
from .sharing import UnfrozenWeight


def backend(session: Session, kind: str) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """The Dynamo backend of one kind of region: ``"block"``, ``"head"`` or ``"norm"``."""

    def fusewright(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph, examples, session, kind)

    return fusewright  # TorchDynamo's messages name the backend by its function


def captured(function: Callable[..., Any], session: Session, kind: str) -> Callable[..., Any]:
    """``torch.compile`` of ``function``, with what ``Session.capturing`` sets for each capture."""
    # to set it around each call would take as long as to find the graph
    context: Any = torch._dynamo.optimize(backend(session, kind), nopython=kind != "head")
    convert = context.callback

    @functools.wraps(convert)  # with its attributes: TorchDynamo finds the backend by them
    def capture(*args: Any, **kwargs: Any) -> Any:
        with session.capturing():
            return convert(*args, **kwargs)

    context.callback = capture
    run: Callable[..., Any] = context(function)
    return run


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Any], session: Session, kind: str
) -> Callable[..., Any]:
    """Compile a captured graph, stage by stage. ``FUSEWRIGHT_DUMP`` shows what each one changed.

    ``graph`` is changed in place. Only blocks are planned and go through Inductor, whose
    compilation they share.
    """
    choices, region = session.choices, session.state.region
    arguments = [a for n in graph.graph.nodes if (a := n.meta.get("grapharg")) is not None]
    grad = torch.is_grad_enabled()
    if kind == "head" and region is not None:
        session.state.watches.watch_inlined(region)
    gradient_reason = input_gradient_reason(graph) if grad and kind == "block" else None
    if gradient_reason is not None:
        session.state.require_no_leaf(gradient_reason)
    session.state.count_graph()
    # their hooks would be called, with None
    idle = inputs_without_gradient(graph) if grad and kind == "block" else []
    caller_writes = grad and kind != "head" and may_write(choices.planner.model(), region)
    stages = StageLog(kind, choices.environment.dump, session.log.keeps_code)
    before = stages.record(graph, "captured")

    with _without_saved_tensor_hooks():
        require_gradients(graph)
        require_marked_writes(graph)
        if grad and accumulates_twice(graph, lambda: _is_shared(choices.planner.model(), region)):
            session.note_two_accumulations()
        remove_writes(graph)
        stages.dump(graph, "functionalized")
        remove_noops(graph)
        stages.dump(graph, "cleaned")
        absent = AbsentGradients(inputs_of_outputs(graph) if grad and kind == "block" else None)
        eager_losses = copy_if_loss(graph)
        findings = _recognise_and_fuse(graph, choices)
        stages.dump(graph, "fused")
        lazy = choices.options.logits == "lazy"
        model, reads = choices.planner.model, session.log.reads
        call = session.state.replay
        is_alone = kind == "head" and call is not None and not call.is_labelled
        defer_logits(graph, eager_losses, findings, lazy, model, reads, is_alone)
        stages.dump(graph, "logits")
        copy_what_is_written(graph, caller_writes)
        graph.recompile()
        stages.dump(graph, "copied")

    copied = inputs_to_copy(graph, caller_writes) if grad and kind != "head" else ()
    # graphs without gradients mostly serve evaluation, not worth a second compilation
    compiled = kind == "block" and (grad or choices.options.compile_no_grad)
    choice = _choose_codegen(graph, choices) if compiled else "eager"
    if kind == "block" and grad and region is not None:
        graph = planned(choices.planner, region, graph, examples, choice)
    after = stages.record(graph, "rewritten")

    run = _generate_code(graph, examples, choice, session, idle, absent)
    run = with_changed_inputs(offloaded(choices.planner, graph, run), copied, Tensor.clone)
    captured = CapturedGraph(findings, grad, stages.number, before, after)
    return _recorded(session, captured, run, gradient_reason, arguments)


def _is_shared(model: nn.Module | None, region: nn.Module | None) -> bool:
    """Whether a parameter of ``region`` has several names in ``model``."""
    if model is None or region is None:
        return False
    parameters = set(region.parameters())
    names = [p for _, p in model.named_parameters(remove_duplicate=False) if p in parameters]
    return len(names) > len(parameters)


def _without_saved_tensor_hooks() -> AbstractContextManager[object]:
    """Hide from hooks on saved tensors what rules and their verification save."""
    # a region's first call may be counted: a checkpoint compares what it saves with the second
    hooks: Any = torch._C._autograd  # 2026-11-26: torch does not type all of it
    if not hooks._saved_tensors_hooks_is_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(saved_by_hook, lambda t: t)


def _recognise_and_fuse(graph: fx.GraphModule, choices: Choices) -> list[Finding]:
    """Apply the rules: formulas become ops, then ops and their neighbours become larger ops."""
    # one call: a formula counts as missed only when the last rule has run, and the rules of both
    # kinds run in one nested graph after the other
    verify = None if choices.options.verify == "off" or choices.fake else choices.verifier
    with quiet_randomness():
        return apply(graph, choices.rules, TABLE, verify, choices.fuel)


def _choose_codegen(graph: fx.GraphModule, choices: Choices) -> str:
    """``"eager"`` or ``"inductor"``, for the graph of a block."""
    choice = choices.codegen[0]
    # a compiler would unroll what was captured whole and not rewritten
    if any(is_leaf(n.target) for inner in nested(graph) for n in inner.graph.nodes):
        return "eager"
    if choice == "inductor" and writes_into_inputs(graph):
        choices.planner.note("a block that writes into what it was given is not compiled")
        return "eager"
    if choice == "inductor" and draws_in_vain(graph):
        choices.planner.note("a block with unused draws of random numbers is not compiled")
        return "eager"
    return choice


def _generate_code(
    graph: fx.GraphModule,
    examples: Sequence[Any],
    choice: str,
    session: Session,
    idle: list[int],
    absent: AbsentGradients,
) -> Callable[..., Any]:
    if choice == "inductor" and not session.choices.fake:  # its memory is predicted all the same
        inputs = [t.detach() if i in idle else t for i, t in enumerate(examples)]
        run = inductor(graph, inputs, session.state.preparation, absent)
        return _of_frozen(with_changed_inputs(run, idle, Tensor.detach), examples)
    return eager(graph)


def _of_frozen(run: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """``run``, a compiled graph, which refuses inputs that need a gradient and needed none."""
    # it would give them none, and TorchDynamo 2.11 does not ask whether a weight needs one now
    frozen = [i for i, t in enumerate(examples) if isinstance(t, Tensor) and not t.requires_grad]

    def call(*args: Any) -> Any:
        if any([args[i].requires_grad for i in frozen]) and torch.is_grad_enabled():
            raise UnfrozenWeight(
                "a weight needs a gradient and needed none when the block was compiled: call "
                "restore and optimize after weights are unfrozen, or use a newer PyTorch"
            )
        return run(*args)

    return call


def _recorded(
    session: Session,
    graph: CapturedGraph,
    run: Callable[..., Any],
    needs_own: str | None,
    arguments: list[Any],
) -> Callable[..., Any]:
    """``run``, which notes in the log that the region at hand ran ``graph``."""

    def call(*args: Any) -> Any:
        # TorchDynamo's records of the captured inputs: copies of the graph keep them, with weak
        # references that torch.utils.swap_tensors refuses. At the first call the capture is over
        while arguments:
            arguments.pop().erase()
        if needs_own is not None:
            session.state.require_no_leaf(needs_own)
        session.record(graph)
        x = session.state.no_gradient
        return run(*(args if x is None else with_leaf(args, x)))

    return call
