"""Logits that are returned beside a fused loss: computed when they are read."""

from __future__ import annotations

from ..logits.deferral import NodesBefore, copy_if_loss, defer_logits
from ..unit import Feature, Unit


class DeferredLogits(Feature):
    """Defer logits that are returned with a fused loss, or by a head without labels."""

    name = "deferred_logits"

    def __init__(self) -> None:
        self._before: NodesBefore = {}

    def open(self, unit: Unit) -> None:
        """Copy the nodes of the graph if it has a loss that a rule may fuse."""
        self._before = copy_if_loss(unit.graph)

    def close(self, unit: Unit) -> None:
        """Defer the logits, or restore a loss that a returned value would not lead to."""
        choices = unit.choices
        defer_logits(
            unit.graph, self._before, unit.notes.findings, choices.options.logits == "lazy",
            choices.planner.model, unit.call.reads, unit.call.is_unlabelled,
        )  # fmt: skip
