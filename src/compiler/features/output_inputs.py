"""The inputs of each output: which gradients eager mode does not have. None is not zeros."""

from __future__ import annotations

from ..unit import Feature, Unit


class OutputInputs(Feature):
    """Record which inputs each output of a block depends on, for the code that is generated."""

    name = "output_inputs"

    def open(self, unit: Unit) -> None:
        """Record it while the graph holds PyTorch's own operations."""
        if unit.is_trained_block:
            unit.notes.inputs_of_outputs = unit.effects.inputs_of_outputs
