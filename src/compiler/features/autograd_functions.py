"""Autograd functions: remove what the capture adds to them."""

from __future__ import annotations

from ...graph import facts
from ...graph.opaque.autograd_functions import drop_unread_results
from ..unit import Feature, Unit


class AutogradFunctions(Feature):
    """Remove the results that TorchDynamo adds to autograd functions and nothing reads."""

    name = "autograd_functions"

    def open(self, unit: Unit) -> None:
        """Remove them, in nested graphs too."""
        for inner in facts.nested(unit.graph):
            drop_unread_results(inner.graph)
