"""Experts whose weights a formula computes: one expert at a time."""

from __future__ import annotations

from ...graph.packed_stacks import pack_stacks
from ..unit import Feature, Unit


class PackedStacks(Feature):
    """Let routed experts take weights by formula, one expert at a time."""

    name = "packed_stacks"

    def close(self, unit: Unit) -> None:
        """Replace computed stacks of weights by their packed tensors."""
        pack_stacks(unit.graph)
