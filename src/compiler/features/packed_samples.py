"""Packed samples: masks of samples that share a row."""

from __future__ import annotations

from ...graph.sample_masks import masks_left, sink_masks
from ..unit import Feature, Unit


class PackedSamples(Feature):
    """Keep masks of samples as the first key that each position sees."""

    name = "packed_samples"

    def open(self, unit: Unit) -> None:
        """Let nested graphs make the masks that they are given."""
        sink_masks(unit.graph)

    def close(self, unit: Unit) -> None:
        """Refuse the graph if anything but fused attention reads such a mask."""
        if any(True for _ in masks_left(unit.graph)):
            raise NotImplementedError("other code than fused attention reads the mask of samples")
