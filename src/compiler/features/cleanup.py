"""Nodes that do nothing: removed before rules run."""

from __future__ import annotations

from ...graph.cleanup import remove_noops
from ..unit import Feature, Unit


class Cleanup(Feature):
    """Remove dead nodes, needless casts and dropouts that drop nothing."""

    name = "cleanup"

    def open(self, unit: Unit) -> None:
        """Remove them."""
        remove_noops(unit.graph)
