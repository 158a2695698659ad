"""Gradients of a block's inputs: refuse graphs in which they would differ from eager mode."""

from __future__ import annotations

from ...graph.effects import is_reentrant
from ..calls.input_gradients import input_gradient_reason
from ..sharing import InputGradient
from ..unit import Feature, Unit


class InputGradients(Feature):
    """Find the inputs that must have their caller's gradient, and those that get none."""

    name = "input_gradients"

    def open(self, unit: Unit) -> None:
        """Read the graph as captured.

        Raises:
            InputGradient: a leaf took the place of the first input, and the block would differ.
            NotImplementedError: the graph contains a reentrant checkpoint, which looks at which of
                its inputs have a gradient, and accumulates the gradients of parameters itself.
        """
        if any(map(is_reentrant, unit.effects.checkpoints)):
            raise NotImplementedError("a reentrant checkpoint (use_reentrant=False is captured)")
        notes = unit.notes
        if unit.is_trained_block:
            notes.gradient_reason = input_gradient_reason(unit.effects)
            if notes.gradient_reason is not None and unit.call.has_leaf:
                raise InputGradient(notes.gradient_reason)
            notes.detached = unit.effects.inputs_without_gradient  # hooks would be called with None
