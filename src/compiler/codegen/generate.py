"""Choosing what runs a rewritten graph, eager PyTorch or Inductor, and making it."""

from __future__ import annotations

from ...graph.run import eager
from ...rewrite.op_table import OPS
from ..unit import Run, Unit
from .inductor import compiled_block


def choose_codegen(unit: Unit) -> str:
    """Return ``"inductor"`` for the graph of a block that can be compiled, else ``"eager"``."""
    # graphs without gradients mostly serve evaluation, not worth a second compilation
    choices, effects = unit.choices, unit.effects
    if unit.kind != "block" or not (unit.grad or choices.options.compile_no_grad):
        return "eager"
    if choices.codegen[0] != "inductor" or effects.leaves:
        return "eager"  # a compiler would unroll what was captured whole and not rewritten
    dominant = [op.name for op in OPS if op.dominates and op.call in effects.targets]
    if effects.lasting_writes:
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
        return "inductor"
    return "eager"


def generate_code(unit: Unit) -> Run:
    """Return what runs the graph of ``unit``."""
    # of fake weights the memory is predicted all the same
    is_compiled = unit.codegen == "inductor" and not unit.choices.fake
    return compiled_block(unit) if is_compiled else eager(unit.graph)
