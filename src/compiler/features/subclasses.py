"""Weights that are tensor subclasses: formulas of their inner tensors while rules run."""

from __future__ import annotations

from ...graph.subclasses import Opened, close_weights, open_weights
from ..unit import Feature, Unit


class Subclasses(Feature):
    """Open frozen weights in few bits that multiply by themselves (torchao's)."""

    name = "subclasses"

    def __init__(self) -> None:
        self._opened: Opened = []

    def open(self, unit: Unit) -> None:
        """Give linear layers the formula of the weight that ``dequantize`` returns."""
        self._opened = open_weights(unit.graph)

    def close(self, unit: Unit) -> None:
        """Put back the weights of products that no rule has rewritten."""
        close_weights(self._opened)
