"""The TorchDynamo backend: a captured graph in, the optimized callable out.

``compile_graph`` names the stages of a compilation in their order. A stage asks
``Compilation.effects`` what the graph does, changes it in place, and notes in the ``Compilation``
what later stages need.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ..graph import facts
from ..graph.cleanup import remove_noops
from ..graph.effects import Effects
from ..graph.functionalize import remove_writes, require_marked_writes
from ..graph.opaque.autograd_functions import drop_unread_results
from ..graph.packed_stacks import pack_stacks
from ..graph.run import eager
from ..graph.sample_masks import masks_left, sink_masks
from ..graph.segments import join_segments
from ..graph.subclasses import close_weights, open_weights
from ..kernels import candidates
from ..kernels.saved_tensors import without_saved_tensor_hooks
from ..memory.apply_plan import offloaded, planned
from ..memory.oom_retry import is_out_of_memory
from ..rewrite.copies import copy_what_is_written
from ..rewrite.engine import apply
from ..rewrite.findings import Finding
from ..rewrite.op_table import OPS, TABLE
from ..rewrite.verify import quiet_randomness
from ..upstream import changed
from .calls.input_gradients import (
    accumulates_twice,
    input_gradient_reason,
    require_gradients,
    with_leaf,
)
from .codegen.inductor import AbsentGradients, inductor
from .graph_log import CapturedGraph, StageLog
from .logits.deferral import NodesBefore, copy_if_loss, defer_logits
from .session import Session
from .sharing import CaptureError, UnfrozenWeight, WholeMask

_logger = logging.getLogger(__name__)


def backend(session: Session, kind: str) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """The Dynamo backend of one kind of region (``regions.py``)."""

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
            try:
                return convert(*args, **kwargs)
            except Exception as error:
                if _says_so(error):
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
            if state.has_run or _says_so(error):
                raise
            raise CaptureError(error) from error

    return run_whole


def _says_so(error: Exception) -> bool:
    """Whether the class of what was raised in a capture says how it is to be taken."""
    # guards are made in other packages of PyTorch, which raise what they happen to raise
    refused = isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))
    return refused or is_out_of_memory(error)


@dataclass(eq=False)
class Compilation:
    """A captured graph on its way, and what its stages have learnt of it and decided.

    The inputs at ``idle`` need a gradient and get none; copies are made of those at ``copied``.
    """

    graph: fx.GraphModule
    examples: Sequence[Any]
    session: Session
    kind: str
    grad: bool
    arguments: list[Any] = field(default_factory=list)  # TorchDynamo's records of the inputs
    # why a block's input must have the gradient that its caller gives it
    gradient_reason: str | None = None
    idle: Sequence[int] = ()
    copied: Sequence[int] = ()
    absent: AbsentGradients = field(default_factory=lambda: AbsentGradients(None))
    losses: NodesBefore = field(default_factory=dict)  # the nodes before a loss was fused
    findings: list[Finding] = field(default_factory=list)
    codegen: str = "eager"
    run: Callable[..., Any] | None = None
    _effects: Effects | None = None

    @functools.cached_property
    def log(self) -> StageLog:
        """What shows the graph after each stage."""
        session = self.session
        return StageLog(self.kind, session.choices.environment.dump, session.log.keeps_code)

    @property
    def effects(self) -> Effects:
        """What the graph does now; stages that change nothing share one record."""
        if (
            self._effects is None
            or self._effects.module is not self.graph
            or not self._effects.is_current()
        ):
            self._effects = Effects(self.graph)
        return self._effects

    @property
    def is_trained_block(self) -> bool:
        """Whether it is a block's graph, with gradients: those are planned and compiled."""
        return self.kind == "block" and self.grad


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Any], session: Session, kind: str
) -> Callable[..., Any]:
    """Compile a captured graph, stage by stage. ``FUSEWRIGHT_DUMP`` shows what each one changed.

    ``graph`` is changed in place. Only blocks are planned and go through Inductor, whose
    compilation they share.
    """
    work = Compilation(graph, examples, session, kind, torch.is_grad_enabled())
    _run(work, (None, trim), ("captured", read_as_captured))
    with without_saved_tensor_hooks():  # from rules and their verification
        _run(
            work,
            (None, refuse_what_differs),  # while checkpoints and writes are as in the code
            ("functionalized", functionalize),  # before the rules, which leave writes alone
            ("cleaned", clean),  # after writes are values, some of which nothing needs
            ("fused", recognise_and_fuse),
            ("logits", defer),  # after the rules: logits are deferred where a loss was fused
            ("copied", copy_written),  # after all ops are there: they say what they keep
        )
    _run(
        work,
        (None, choose_codegen),
        ("rewritten", plan),  # after the choice: what is worth keeping depends on it
        (None, generate_code),
    )
    assert work.run is not None
    return work.run


def _run(work: Compilation, *stages: tuple[str | None, Callable[[Compilation], None]]) -> None:
    """Run stages in their order, and show the graph after those that have a name."""
    for name, stage in stages:
        stage(work)
        if name is not None:
            work.log.show(work.graph, name)


# --- as captured: what must be known before anything changes --------------------------------------


def trim(work: Compilation) -> None:
    """Remove what the capture has added to autograd functions, before their effects are read."""
    for inner in facts.nested(work.graph):
        drop_unread_results(inner.graph)


def read_as_captured(work: Compilation) -> None:
    """Ask what only the captured graph tells; the call may be refused, and made again."""
    tensors = (t for n in work.graph.graph.nodes if (t := facts.tensor(n)) is not None)
    candidates.measure({t.dtype for t in tensors if t.device.type == "cpu"})
    state = work.session.state
    inputs = (n.meta.get("grapharg") for n in work.graph.graph.find_nodes(op="placeholder"))
    work.arguments = [argument for argument in inputs if argument is not None]
    if work.kind == "head" and state.region is not None:
        state.watches.watch_inlined(state.region)
    if work.is_trained_block:
        work.gradient_reason = input_gradient_reason(work.effects)
    if work.gradient_reason is not None:
        state.require_no_leaf(work.gradient_reason)
    state.count_graph()
    if work.is_trained_block:  # the hooks of such inputs would be called, with None
        work.idle = work.effects.inputs_without_gradient


def refuse_what_differs(work: Compilation) -> None:
    """Raise where a captured graph would do something else than eager mode."""
    require_gradients(work.effects)
    require_marked_writes(work.effects)
    model, region = work.session.choices.planner.model, work.session.state.region
    if work.grad and accumulates_twice(work.effects, model, region):
        work.session.note_two_accumulations()


# --- rewriting: formulas become ops ---------------------------------------------------------------


def functionalize(work: Compilation) -> None:
    """Turn writes into values, and pieces into rows, so that patterns see them."""
    remove_writes(work.graph)
    join_segments(work.graph)
    sink_masks(work.graph)


def clean(work: Compilation) -> None:
    """Remove what does nothing; note what each output is made of, which fused ops would hide."""
    remove_noops(work.graph)
    if work.is_trained_block:
        work.absent = AbsentGradients(work.effects.inputs_of_outputs)


def recognise_and_fuse(work: Compilation) -> None:
    """Apply the rules: formulas become ops, then ops and their neighbours become larger ops."""
    # one call: a formula counts as missed only when the last rule has run, and the rules of both
    # kinds run in one nested graph after the other
    choices = work.session.choices
    work.losses = copy_if_loss(work.graph)
    verify = None if choices.options.verify == "off" or choices.fake else choices.verifier
    opened = open_weights(work.graph)
    with quiet_randomness():
        work.findings = apply(work.graph, choices.rules, TABLE, verify, choices.fuel)
    close_weights(opened)
    pack_stacks(work.graph)
    if any(True for _ in masks_left(work.graph)):
        raise WholeMask("something reads the mask of samples that share a row")


def defer(work: Compilation) -> None:
    """Let logits that are returned with a fused loss be computed when they are read."""
    choices, call = work.session.choices, work.session.state.replay
    lazy = choices.options.logits == "lazy"
    is_alone = work.kind == "head" and call is not None and not call.is_labelled
    defer_logits(
        work.graph, work.losses, work.findings, lazy, choices.planner.model,
        work.session.log.reads, is_alone,
    )  # fmt: skip


def copy_written(work: Compilation) -> None:
    """Copy what an op keeps for backward, and the graph, or its caller, writes into."""
    open_to_writes = work.grad and work.kind != "head"
    copy_what_is_written(work.effects, open_to_writes)
    work.graph.recompile()
    if open_to_writes:
        work.copied = _hidden_states(work)


def _hidden_states(work: Compilation) -> list[int]:
    """The places of the inputs that are hidden states: the first of the call, and results' like."""
    # In low precision eager allows ``x += layer(x)``: a norm keeps its own fp32 copy of x. Our ops,
    # a compiler's and a checkpoint keep x itself, and backward would refuse it. Whether the caller
    # writes is not known; in fp32, too, it may write where backward does not pass the norm. But it
    # mostly goes on to the result, and lets x go. Then the copies keep no memory, and take 0.4 to
    # 1.2% of a step (SmolLM2-135M, 4 x 256, bfloat16, full training, 2 cores, 2026-11-29).
    # What is given to all blocks of a stack (masks, positions, an encoder's states) is not copied:
    # a result has at most one input of its size.
    graph, first = work.graph.graph, work.session.state.first_input
    inputs, outputs = graph.find_nodes(op="placeholder"), graph.output_node().all_input_nodes
    results = [t for t in map(facts.tensor, outputs) if t is not None and t.requires_grad]
    left = Counter(str(t.shape) for t in results)
    is_first = [first is not None and facts.real(node) is first for node in inputs]
    places = []
    for i in sorted(work.effects.open_inputs, key=lambda i: not is_first[i]):
        size = str(getattr(facts.tensor(inputs[i]), "shape", None))
        if is_first[i] or left[size]:
            left[size] -= 1
            places.append(i)
    return places


# --- generating code: what runs the graph ---------------------------------------------------------


def choose_codegen(work: Compilation) -> None:
    """Decide whether Inductor compiles a block's graph."""
    # graphs without gradients mostly serve evaluation, not worth a second compilation
    choices, effects = work.session.choices, work.effects
    if work.kind != "block" or not (work.grad or choices.options.compile_no_grad):
        return
    if choices.codegen[0] != "inductor" or effects.leaves:
        return  # a compiler would unroll what was captured whole and not rewritten
    dominant = [op.name for op in OPS if op.dominates and op.call in effects.targets]
    if (reason := changed("Inductor")) is not None:
        choices.planner.note(f"blocks are not compiled: {reason}")
    elif effects.lasting_writes:
        # backward would fail or be wrong: AOTAutograd (torch 2.13) keeps such an input for it, and
        # writes into that
        choices.planner.note("a block that writes into what it was given is not compiled")
    elif effects.unused_draws:
        # they would be drawn after those that follow them: AOTAutograd (torch 2.13) puts what has
        # no users at the end of its forward
        choices.planner.note("a block with unused draws of random numbers is not compiled")
    elif dominant and effects.convolved_lengths:
        # Inductor (torch 2.13) makes a graph for each length of one that it computes gradients of
        choices.planner.note(f"a block with {dominant[0]} and convolutions is not compiled")
    else:
        work.codegen = "inductor"


def plan(work: Compilation) -> None:
    """Let a block keep for backward what its level says."""
    region = work.session.state.region
    if work.is_trained_block and region is not None:
        planner = work.session.choices.planner
        work.graph = planned(planner, region, work.effects, work.examples, work.codegen)


def generate_code(work: Compilation) -> None:
    """Make what runs the graph, and what is done to its inputs at each call."""
    session = work.session
    # of fake weights the memory is predicted all the same
    if work.codegen == "inductor" and not session.choices.fake:
        inputs = [t.detach() if i in work.idle else t for i, t in enumerate(work.examples)]
        placeholders = work.graph.graph.find_nodes(op="placeholder")
        for i in work.copied:  # whose copies have other strides, if they are no dense memory
            t: Any = facts.tensor(placeholders[i])
            inputs[i] = t.detach().clone().requires_grad_(inputs[i].requires_grad)
        held = [i for i, n in enumerate(placeholders) if not facts.is_argument(n)]
        graphs = session.choices.graphs.of_block(held, work.examples)
        _logger.info(
            "Inductor compiles a graph of %d operations; other sizes or settings may need another",
            len(work.graph.graph.nodes),
        )
        run = inductor(work.graph, inputs, session.state.preparation, work.absent, graphs)
        run = _of_frozen(with_changed_inputs(run, work.idle, Tensor.detach), work.examples)
    else:
        run = eager(work.graph)
    run = offloaded(session.choices.planner, work.graph, run)
    work.run = _recorded(with_changed_inputs(run, work.copied, Tensor.clone), work)


def with_changed_inputs(
    run: Callable[..., Any], places: Sequence[int], change: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """``run``, a region's graph, with ``change`` applied to its arguments at ``places``."""
    # at every call: that one step wrote nothing says nothing of the next one
    if not places:
        return run

    def call(*args: Any) -> Any:
        inputs = list(args)
        for i in places:
            inputs[i] = change(args[i])
        return run(*inputs)

    return call


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


def _recorded(run: Callable[..., Any], work: Compilation) -> Callable[..., Any]:
    """``run``, which notes in the log that the region at hand ran the graph."""
    session, needs_own, arguments = work.session, work.gradient_reason, work.arguments
    graph = CapturedGraph(work.findings, work.grad, work.log.number, *work.log.code)

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
