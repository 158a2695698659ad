"""From samples to batches: packs of whole samples, and their collation.

In a pack every sample keeps its own positions, from 0. transformers builds the block-causal mask
from them (when there is no ``attention_mask`` and no cache), so a sample attends only to itself.
What is recurrent (scans, short convolutions) starts anew at each sample in optimized models only
(``compiler/segments.py``). ``compiler/packs.py`` refuses models that do not keep samples apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .sample import IGNORED, Sample

if TYPE_CHECKING:
    from torch import Tensor

Pack = list[Sample]
"""Samples that share one sequence. Without packing: one sample."""

GRANULE = 64
"""Batches are padded to a multiple of this many tokens, so that few lengths occur."""


def pack(
    lengths: Iterable[int], limit: int, most: int | None = None, window: int | None = None
) -> list[list[int]]:
    """Fill sequences of ``limit`` tokens with whole samples, best fit first; returns their indices.

    Longest first, each sample goes where it leaves the least room (Johnson's best-fit decreasing:
    at most 11/9 of the fewest possible sequences). A million samples take a second or two, because
    sequences with equal room are one entry in the search. ``most`` limits the samples per sequence;
    with ``window``, so many samples are packed at a time, in their order. Raises a ValueError if a
    sample is longer than ``limit``.
    """
    sizes = np.asarray(list(lengths) if not isinstance(lengths, np.ndarray) else lengths, np.int64)
    if sizes.size and int(sizes.max()) > limit:
        raise ValueError(f"a sample of {int(sizes.max())} tokens does not fit into {limit}")
    step = window or max(1, sizes.size)
    groups: list[list[int]] = []
    for begin in range(0, sizes.size, step):
        groups += _best_fit(sizes[begin : begin + step], begin, limit, most or sizes.size)
    return groups


def _best_fit(sizes: np.ndarray, first: int, limit: int, most: int) -> list[list[int]]:
    """Pack one window, whose samples are numbered from ``first``."""
    order = np.argsort(-sizes, kind="stable")
    groups: list[list[int]] = []
    open_: dict[int, list[list[int]]] = {}  # tokens left -> the sequences with so much room
    rooms: list[int] = []  # the keys of `open_`, sorted
    for index, size in zip((order + first).tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            stack = open_[room]
            group = stack.pop()
            if not stack:
                del open_[room], rooms[at]
            group.append(index)
        else:
            room, group = limit, [index]
            groups.append(group)
        rest = room - size
        if rest and len(group) < most:
            if rest in open_:
                open_[rest].append(group)
            else:
                open_[rest] = [group]
                insort(rooms, rest)
    return groups


class Packs(Sequence[Pack]):
    """A map-style dataset of packs, read on access; ``groups`` is the result of ``pack``."""

    def __init__(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> None:
        self.samples, self.groups = samples, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Packs(self.samples, self.groups[index])
        return [self.samples[i] for i in self.groups[index]]


def collate(
    packs: Sequence[Sequence[Sample]], pad_id: int, packing: bool, length: int, full: bool = False,
    hides: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Make one batch.

    With ``packing`` the batch has positions and no mask; without, a mask, and each pack has one
    sample. ``full`` fills every sequence up to ``length``. With ``hides`` the mask hides something
    where ``length`` has room for it.

    Returns:
        ``input_ids`` and ``labels`` (B, T), and ``position_ids`` (B, T) or ``attention_mask``
        (B, T), all int64. T is a multiple of ``GRANULE``, or ``length`` where that is less.
    """
    import torch

    longest = max(sum(len(s.input_ids) for s in p) for p in packs)
    shortest = min(sum(len(s.input_ids) for s in p) for p in packs)
    least = max(longest, shortest + 1) if hides else longest
    width = max(longest, length if full else min(length, -(-least // GRANULE) * GRANULE))
    ids, labels, positions, mask = [], [], [], []
    for samples in packs:
        tokens = [t for s in samples for t in s.input_ids]
        rest = width - len(tokens)
        ids.append(tokens + [pad_id] * rest)
        labels.append([t for s in samples for t in s.labels] + [IGNORED] * rest)
        # the padding is a separate sample, which nothing attends to
        sizes = [*(len(s.input_ids) for s in samples), rest]
        positions.append([i for size in sizes for i in range(size)])
        mask.append([1] * len(tokens) + [0] * rest)
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if packing:
        batch["position_ids"] = torch.tensor(positions)
    else:
        batch["attention_mask"] = torch.tensor(mask)
    return batch


def count(packs: Iterable[Sequence[Sample]]) -> tuple[int, int]:
    """How many tokens ``packs`` hold, and how many of them are trained."""
    tokens = trained = 0
    for samples in packs:
        tokens += sum(len(s.input_ids) for s in samples)
        trained += sum(s.trained for s in samples)
    return tokens, trained
