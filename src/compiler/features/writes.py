"""Writes in place: values while rules run."""

from __future__ import annotations

from ...graph.functionalize import remove_writes, require_marked_writes
from ..unit import Feature, Unit


class Writes(Feature):
    """Turn writes in place into values, so that patterns match them."""

    name = "writes"

    def open(self, unit: Unit) -> None:
        """Turn writes into values; refuse a write that the graph does not mark."""
        require_marked_writes(unit.effects)
        remove_writes(unit.graph)
