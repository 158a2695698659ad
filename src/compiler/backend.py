"""From a captured graph to the callable that runs in its place.

``compile_graph`` is the whole pipeline: each feature opens the unit, the rules rewrite it, each
feature closes it, the memory plan and the code generator make it a callable, and each feature wraps
that. It knows no feature by name (``features/``), and nothing of how regions are called
(``capture.py``, ``session.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kernels.saved_tensors import without_saved_tensor_hooks
from ..memory.apply_plan import offloaded, planned
from ..rewrite.engine import apply
from ..rewrite.op_table import TABLE
from .codegen.generate import choose_codegen, generate_code
from .features import FEATURES
from .unit import Feature, Run, Unit


def compile_graph(unit: Unit, features: Sequence[type[Feature]] = FEATURES) -> Run:
    """Compile a captured graph. ``FUSEWRIGHT_DUMP`` shows what each stage changed.

    ``unit.graph`` is changed in place. Whatever a stage raises refuses the graph: the original code
    runs, with the error as the reason.
    """
    active = [feature() for feature in features]
    unit.log.show(unit.graph, "captured")
    with without_saved_tensor_hooks():  # the caller's, which rules and verification must not call
        for feature in active:
            feature.open(unit)
            unit.log.show(unit.graph, f"open-{feature.name}")
        rewrite(unit)
        unit.log.show(unit.graph, "fused")
        for feature in active:
            feature.close(unit)
            unit.log.show(unit.graph, f"close-{feature.name}")
    unit.codegen = choose_codegen(unit)  # before the plan: what is worth keeping depends on it
    plan_memory(unit)
    unit.log.show(unit.graph, "rewritten")
    run = generate_code(unit)
    run = offloaded(unit.choices.planner, unit.graph, run)
    for feature in active:
        run = feature.wrap(unit, run)
    return run


def rewrite(unit: Unit) -> None:
    """Apply the rules: formulas become ops, then ops and their neighbours become larger ops."""
    # one call: a formula counts as missed only when the last rule has run, and the rules of both
    # kinds run in one nested graph after the other
    choices = unit.choices
    verify = None if choices.options.verify == "off" or choices.fake else choices.verifier
    unit.notes.findings = apply(unit.graph, choices.rules, TABLE, verify, choices.fuel)


def plan_memory(unit: Unit) -> None:
    """Let a block keep for backward what its level of the memory plan allows."""
    if unit.is_trained_block and unit.call.module is not None:
        planner = unit.choices.planner
        unit.graph = planned(planner, unit.call.module, unit.effects, unit.examples, unit.codegen)
