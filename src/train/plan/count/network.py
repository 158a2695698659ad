"""The bytes that a process sends in one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import ProcessLayout
from .tensors import FSDPUnit


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends (and receives) in an optimizer step.

    With n processes a ring all-gather or reduce-scatter of S bytes sends (n - 1)/n S, an all-reduce
    twice that (Patarasu & Yuan, "Bandwidth optimal all-reduce algorithms", 2009).

    Attributes:
        weights: gathered for forward and backward, and after the optimizer's step.
        gradients: reduced among those that share a copy of the weights.
        copies: gradients that are averaged over the copies of the weights.
        activations: of layers, or sequences, that several processes share.
    """

    weights: int = 0
    gradients: int = 0
    copies: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.copies + self.activations


def traffic(
    units: Sequence[FSDPUnit],
    layout: ProcessLayout,
    passes: int,
    tokens: int,
    hidden: int,
    keys: int | None = None,
) -> Traffic:
    """The bytes that a process sends in an optimizer step of ``passes`` forward passes.

    ``tokens`` are those of a micro batch, ``hidden`` is the size of a hidden state, and ``keys``
    that of a token's keys, of all heads, by default ``hidden``.
    """
    stored = sum(u.times * w.bytes for u in units for w in u.weights)
    trained = sum(u.times * w.numbers * w.itemsize for u in units for w in u.weights if w.trains)
    blocks = sum(u.times for u in units if u.name)
    stored, trained = stored // layout.tensor, trained // layout.tensor
    size, local_tokens = _itemsize(units), tokens // layout.context
    activations = (
        passes
        * blocks
        * round(
            _all_reduces(layout, local_tokens * hidden * size)
            + _ring_of_keys(layout, local_tokens, keys or hidden, size)
        )
    )
    n, shard = layout.world, layout.shard
    if layout.engine == "one process":
        return Traffic()
    if layout.engine == "DDP":
        sent = 2 * _ring(layout.replicate) * trained
        return Traffic(copies=round(sent), activations=activations)
    if layout.engine in ("ZeRO-1", "ZeRO-2"):
        times = passes if layout.engine == "ZeRO-2" else 1  # it keeps no whole gradients
        return Traffic(round(_ring(n) * trained), round(_ring(n) * trained * times))
    gathers = 2 if layout.reshards else 1
    outside = sum(w.bytes for u in units if not u.name for w in u.weights) // layout.tensor
    # the root unit stays gathered until backward
    gathered = stored * gathers - (outside if gathers == 2 and layout.engine != "ZeRO-3" else 0)
    between = 2 * _ring(layout.replicate) * trained / max(shard, 1)
    # FSDP2 reduces once an optimizer step: accelerate turns it off for the passes before
    reduced = trained * (passes if layout.engine == "ZeRO-3" else 1)
    return Traffic(
        round(_ring(shard) * gathered * passes),
        round(_ring(shard) * reduced),
        round(between),
        activations,
    )


def _ring(n: int) -> float:
    return (n - 1) / n if n > 1 else 0.0


def _itemsize(units: Sequence[FSDPUnit]) -> int:
    return max((w.itemsize for u in units for w in u.weights if not w.trains), default=0) or max(
        w.itemsize for u in units for w in u.weights
    )


def _all_reduces(layout: ProcessLayout, hidden_bytes: int) -> float:
    """Of tensor parallelism: two in a block's forward and two in its backward."""
    return 4 * 2 * _ring(layout.tensor) * hidden_bytes


def _ring_of_keys(layout: ProcessLayout, tokens: int, keys: int, itemsize: int) -> float:
    """Of ring attention: keys and values go round in forward, with their gradients in backward."""
    return 6 * (layout.context - 1) * tokens * keys * itemsize
