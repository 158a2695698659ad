"""The time of a step and of a run: operations and bytes against the rates of a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...memory.choice import Usages
from ...memory.levels import HOSTED
from .cards import CARDS_OF_A_MACHINE, Card
from .count.layout import ProcessLayout
from .count.network import Traffic
from .estimate import Memory, TrainingJob

_UTILIZATION = 0.45
"""The part of a GPU's peak that a training step reaches: assumed, until a GPU has run it."""

_CPU_UTILIZATION = 0.55
"""The same of a CPU's matrix products: SmolLM2's step spends three fifths of its time in them."""

_HIDDEN = 0.7
"""The part of a step in which communication overlaps with computation: assumed."""


_HOST_LINK = 20e9
"""Bytes per second of copies between a GPU and its host (PCIe 4 x16), which overlap with work."""


@dataclass(frozen=True)
class Speed:
    """The work of one process in an optimizer step, and its time.

    Attributes:
        flops: floating-point operations, recomputation included.
        compute_seconds: of the operations, or of reading and writing weights and states, whichever
            takes longer.
        network_seconds: of the bytes alone.
        seconds: of the step: communication overlaps with computation, in part.
        tokens: of all processes.
    """

    flops: int
    sent: int
    compute_seconds: float
    network_seconds: float
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.tokens / self.seconds


def step_flops(job: TrainingJob, memory: Memory, layout: ProcessLayout, factor: float = 1.0) -> int:
    """The floating-point operations of one process in one micro batch.

    A multiply-add is two; attention is counted without its causal half left out, as PyTorch does.
    ``memory`` decides what each block keeps, and so what is computed again; ``factor`` is how many
    times the counted tokens a micro batch has.
    """
    counts = Counter(memory.levels)
    total = 0.0
    for usages in job.blocks(factor):
        level = next(v for v in counts if counts[v])
        counts[level] -= 1
        usage = usages.get(HOSTED.get(level, level))  # copies to the host are no operations
        total += usage.flops if usage is not None else 0
        total += job.extra_forward_passes * _forward(job, usages)
    if job.step.images is not None:
        total += (1 + job.extra_forward_passes) * factor * job.step.images.flops
    tokens = round(job.step.tokens * factor)
    total += head_flops(job, tokens) + job.extra_forward_passes * head_flops(
        job, tokens, forward=True
    )
    return round(total / (layout.tensor * layout.context))


def _forward(job: TrainingJob, usages: Usages) -> float:
    """Operations of a block's forward pass alone: what recomputation adds."""
    lean, whole = usages.get("input"), usages.get(job.all_levels()[0])
    return 0.0 if lean is None or whole is None else max(0.0, lean.flops - whole.flops)


def head_flops(job: TrainingJob, tokens: int, forward: bool = False) -> int:
    """Of the output head, with every token trained; ``forward``: of the forward pass alone.

    Each of its matrices has a product in forward and one in backward; a trained one has one more.
    """
    head = job.blueprint.model.get_output_embeddings()
    total = 0
    for name, p in () if head is None else head.named_parameters():
        if p.dim() > 1 and "original_module" not in name:  # of a copy that is trained
            total += 2 * tokens * p.numel() * (1 if forward else 3 if p.requires_grad else 2)
    return total


def speed(
    job: TrainingJob,
    memory: Memory,
    layout: ProcessLayout,
    sent: Traffic,
    card: Card,
    factor: float = 1.0,
) -> Speed:
    """The time of an optimizer step, on a device ``card`` for each process.

    ``factor`` is how many times the counted tokens a micro batch has.
    """
    flops = job.passes * step_flops(job, memory, layout, factor)
    part = _CPU_UTILIZATION if job.process.is_host else _UTILIZATION * job.rate
    compute = max(flops / (card.flops * part), _moved(job, memory, layout) / card.bandwidth)
    compute = max(compute, 2 * job.passes * memory.offloaded / _HOST_LINK)
    network = _seconds(sent, layout, card)
    seconds = max(compute, network) + (1 - _HIDDEN) * min(compute, network)
    tokens = round(job.step.tokens * factor) * job.passes * layout.data_ranks
    return Speed(flops, sent.total, compute, network, seconds, tokens)


def _moved(job: TrainingJob, memory: Memory, layout: ProcessLayout) -> int:
    """Bytes of weights and states that a step reads and writes at least.

    Each pass reads all weights once forward, and once or twice backward; the optimizer reads and
    writes its states, and what is trained.
    """
    stored = sum(u.times * w.bytes for u in job.units for w in u.weights) // layout.tensor
    return 3 * job.passes * stored + 2 * (memory.optimizer + memory.gradients)


def _seconds(sent: Traffic, layout: ProcessLayout, card: Card) -> float:
    """Of what is sent: over links if the processes that share a copy fit into one machine."""
    inside = sent.weights + sent.gradients + sent.activations
    shares = layout.shard * layout.tensor * layout.context
    if layout.engine.startswith("ZeRO"):
        shares = layout.world
    near = card.link if shares <= CARDS_OF_A_MACHINE else card.network
    far = card.link if layout.world <= CARDS_OF_A_MACHINE else card.network
    return inside / near + sent.copies / far
