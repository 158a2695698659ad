"""The order in which the sequences of an epoch are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from ..recipe.recipe import Recipe

Kind = Literal["shuffled", "in order", "by length"]

_SPAN = 50
"""Batches that are sorted among themselves: the order stays random, the padding short."""


class Order(Sampler[int]):
    """Indices of sequences, in an order that only the seed and the number of the epoch decide.

    It draws nothing from the global random state: a run that resumes from a checkpoint sees the
    same order as one that was never stopped.

    Args:
        kind: ``shuffled``; ``in order``; or ``by length``: shuffled, but batches of similar
            lengths.
    """

    def __init__(self, lengths: Sequence[int], seed: int, kind: Kind, batch: int) -> None:
        self.lengths, self.seed, self.kind, self.batch, self.epoch = lengths, seed, kind, batch, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        number = len(self.lengths)
        if self.kind == "in order":
            return iter(range(number))
        order = torch.randperm(number, generator=generator).tolist()
        if self.kind == "shuffled":
            return iter(order)
        batches = []
        for start in range(0, number, _SPAN * self.batch):
            chunk = sorted(order[start : start + _SPAN * self.batch], key=self._longest_first)
            batches += [chunk[i : i + self.batch] for i in range(0, len(chunk), self.batch)]
        # the longest first, so that it shows at once whether there is memory for it
        first, rest = batches[:1], batches[1:]
        last = [rest.pop()] if rest else []  # which may not be full, and would shift the others
        shuffled = [rest[j] for j in torch.randperm(len(rest), generator=generator).tolist()]
        return iter([i for batch in [*first, *shuffled, *last] for i in batch])

    def _longest_first(self, index: int) -> int:
        return -self.lengths[index]


class RepeatedOrder(Order):
    """The order of prompts whose completions are generated in batches, and compared.

    Each prompt of a batch is repeated ``each`` times, once per completion; each batch is repeated
    ``repeats`` times, because its reader trains one part of it each time. Prompts at the end that
    fill no batch are left out. ``prompts`` is the number of prompts in a batch.
    """

    def __init__(
        self, lengths: Sequence[int], seed: int, kind: Kind, prompts: int, each: int, repeats: int
    ) -> None:
        super().__init__(lengths, seed, kind, prompts)
        self.each, self.repeats = each, repeats

    def __len__(self) -> int:
        whole = super().__len__() // self.batch
        return whole * self.batch * self.each * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        for start in range(0, len(order) - self.batch + 1, self.batch):
            prompts = order[start : start + self.batch]
            batch = [index for index in prompts for _ in range(self.each)]
            for _ in range(self.repeats):
                yield from batch


def kind_of(recipe: Recipe) -> Kind:
    """Which kind of order a recipe asks for."""
    if recipe.curriculum_sampling:
        return "in order"
    return "by length" if recipe.group_by_length else "shuffled"


def _tokens(pack: Any) -> int:
    return sum(len(sample.input_ids) for sample in pack)


def order_of(
    packs: Any, recipe: Recipe, batch: int, length: Callable[[Any], int] = _tokens
) -> Order:
    """The order that a recipe asks for."""
    kind = kind_of(recipe)
    lengths = [0] * len(packs)
    if kind == "by length":
        lengths = [length(packs[i]) for i in range(len(packs))]
    return Order(lengths, recipe.seed, kind, batch)
