"""The TorchDynamo backend: a captured graph in, the optimized callable out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from ..graph.cleanup import remove_noops
from ..graph.facts import nested
from ..graph.functionalize import remove_writes
from ..graph.opaque.functions import is_leaf
from ..graph.run import eager
from ..memory.apply_plan import offloaded, planned
from ..memory.levels import require_gradients, writes_into_inputs
from ..rewrite.copies import copy_what_is_written
from ..rewrite.engine import apply
from ..rewrite.findings import Finding
from ..rewrite.op_table import TABLE
from ..rewrite.verify import quiet_randomness
from . import codegen
from .calls.caller_writes import may_write, on_copies, open_inputs
from .logits.deferral import join_logits, losses
from .session import Captured, Session

_frames = itertools.count(1)


def backend(session: Session, kind: str) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """The Dynamo backend of one kind of region.

    Args:
        session: where choices, verdicts and graphs live.
        kind: ``"block"``, ``"head"`` or ``"norm"``; only blocks go through Inductor, whose
            compilation they share.
    """

    def compile_graph(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        frame, grad = next(_frames), torch.is_grad_enabled()
        if session.shared is not None:
            session.shared.graphs += 1
        before = session.shown(module, frame, kind, "captured")
        open_to_writes = (
            grad and kind != "head" and may_write(session.planner.model(), session.current)
        )
        with _unobserved():
            findings = _rewrite(session, module, open_to_writes)
        places = open_inputs(module) if open_to_writes else ()
        # graphs without gradients serve evaluation: not worth a second compilation; and a compiler
        # would unroll what was captured whole and not rewritten
        compiled = kind == "block" and grad and not _has_leaf(module)
        if compiled and session.codegen[0] == "inductor" and writes_into_inputs(module):
            compiled = False
            session.planner.note("a block that writes into what it was given is not compiled")
        choice = session.codegen[0] if compiled else "eager"
        if kind == "block" and grad and session.current is not None:
            module = planned(session.planner, session.current, module, examples, choice)
        after = session.shown(module, frame, kind, "rewritten")
        captured = Captured(findings, grad, frame, before, after)
        if choice == "inductor":
            run = codegen.inductor(module, examples, session.preparation)
        else:
            run = eager(module)
        run = offloaded(session.planner, module, run)
        run = on_copies(run, places)

        def call(*args: Any) -> Any:
            session.record(captured)
            return run(*args)

        return call

    return compile_graph


def _unobserved() -> AbstractContextManager[object]:
    """A region's first call may be counted: a checkpoint compares what it saves with the second.

    So what rules and their verification save is no business of the hooks on saved tensors around.
    """
    hooks: Any = torch._C._autograd  # 2026-11-26: torch does not type all of it
    if not hooks._saved_tensors_hooks_is_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _has_leaf(module: fx.GraphModule) -> bool:
    return any(is_leaf(n.target) for inner in nested(module) for n in inner.graph.nodes)


def _rewrite(session: Session, module: fx.GraphModule, open_to_writes: bool) -> list[Finding]:
    require_gradients(module)
    remove_writes(module)
    remove_noops(module)
    verify = None if session.options.verify == "off" else session.verifier
    before = losses(module)
    with quiet_randomness():
        findings = apply(module, session.rules, TABLE, verify, session.fuel)
    if before:
        join_logits(module, before, findings, session.options.logits == "lazy")
    copy_what_is_written(module, open_to_writes)
    module.recompile()
    return findings
