"""From samples to batches: packs of whole samples, and their collation.

In a pack every sample keeps its own positions, from 0. transformers builds the block-causal mask
from them (when there is no ``attention_mask`` and no cache), so a sample attends only to itself.
``leaks`` tests that on the model at hand, because not every architecture does it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import IGNORED, Sample

Pack = list[Sample]
"""Samples that share one sequence. Without packing: one sample."""

GRANULE = 64
"""Batches are padded to a multiple of this many tokens, so that few lengths occur."""


def pack(samples: Sequence[Sample], length: int) -> list[Pack]:
    """Fill sequences of ``length`` tokens with whole samples, best fit first.

    Longest first, each sample goes where it leaves the least room (Johnson's best-fit decreasing:
    at most 11/9 of the fewest possible sequences). Samples of equal length keep their order.

    Args:
        samples: none longer than ``length``.
        length: tokens per sequence.
    """
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, index of the pack), sorted
    for sample in sorted(samples, key=lambda s: len(s.input_ids), reverse=True):
        size = len(sample.input_ids)
        if size > length:
            raise ValueError(f"a sample of {size} tokens does not fit into {length}")
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, index = rooms.pop(at)
        else:
            room, index = length, len(packs)
            packs.append([])
        packs[index].append(sample)
        insort(rooms, (room - size, index))
    return packs


def collate(packs: Sequence[Pack], pad_id: int, packing: bool, length: int) -> dict[str, Tensor]:
    """Make one batch.

    Args:
        packs: B sequences.
        pad_id: the token that fills up; it is never trained.
        packing: pass positions (and no mask); otherwise pass a mask, and each pack has one sample.
        length: the longest sequence there may be.

    Returns:
        ``input_ids`` and ``labels`` (B, T), and ``position_ids`` (B, T) or ``attention_mask``
        (B, T). T is a multiple of ``GRANULE``, or ``length`` where that is less.
    """
    longest = max(sum(len(s.input_ids) for s in p) for p in packs)
    width = max(longest, min(length, -(-longest // GRANULE) * GRANULE))
    ids, labels, positions, mask = [], [], [], []
    for samples in packs:
        tokens = [t for s in samples for t in s.input_ids]
        rest = width - len(tokens)
        ids.append(tokens + [pad_id] * rest)
        labels.append([t for s in samples for t in s.labels] + [IGNORED] * rest)
        # the filling is a sample of its own, which nothing attends to
        sizes = [*(len(s.input_ids) for s in samples), rest]
        positions.append([i for size in sizes for i in range(size)])
        mask.append([1] * len(tokens) + [0] * rest)
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if packing:
        batch["position_ids"] = torch.tensor(positions)
    else:
        batch["attention_mask"] = torch.tensor(mask)
    return batch


def count(packs: Sequence[Pack]) -> tuple[int, int]:
    """How many tokens ``packs`` hold, and how many of them are trained."""
    samples = [s for p in packs for s in p]
    return sum(len(s.input_ids) for s in samples), sum(s.trained for s in samples)


@torch.no_grad()
def leaks(model: Callable[..., Any], vocab_size: int, device: torch.device) -> bool:
    """Whether a sample in a pack notices the sample before it.

    Two packs differ only in their first sample; the logits of the second must be the same, bit for
    bit, because masked scores contribute exact zeros.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = 9, 7
    ids = torch.randint(vocab_size, (2, first + second), generator=generator)
    ids[1, first:] = ids[0, first:]
    ids[1, :first] = (ids[0, :first] + 1) % vocab_size
    positions = torch.cat([torch.arange(first), torch.arange(second)]).expand(2, -1)
    logits = model(input_ids=ids.to(device), position_ids=positions.to(device)).logits
    return not torch.equal(logits[0, first:], logits[1, first:])
