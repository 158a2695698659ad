"""The order of prompts that are generated for: groups, batches, and what decides it."""

from __future__ import annotations

import random

import pytest
import torch

from fusewright.train.data.order import Order, RepeatedOrder
from fusewright.train.data.ranks import RankBatches


def test_each_prompt_stands_by_its_completions_and_each_batch_by_its_passes() -> None:
    order = RepeatedOrder([0] * 7, 5, "in order", prompts=3, each=2, repeats=2)
    batch = [0, 0, 1, 1, 2, 2]
    assert list(order) == batch * 2 + [i + 3 for i in batch] * 2  # the seventh fills no batch
    assert len(order) == 24


def test_only_the_seed_and_the_epoch_decide() -> None:
    order = RepeatedOrder([0] * 11, 5, "shuffled", 4, 3, 1)
    first = list(order)
    random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert list(order) == first
    assert torch.equal(torch.get_rng_state(), state)
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(RepeatedOrder([0] * 11, 6, "shuffled", 4, 3, 1)) != first
    assert [i for i in first[::3]] == list(Order([0] * 11, 5, "shuffled", 4))[:8]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_each_batch(ranks: int) -> None:
    """Together, what one process has, of each of the times that a batch is read."""
    order = RepeatedOrder([0] * 9, 5, "shuffled", 3, 4, 2)
    whole = list(order)
    shares = [list(RankBatches(order, 12 // ranks, r, ranks, False)) for r in range(ranks)]
    assert all(len(share) == 6 for share in shares)
    for turn in range(6):
        together = [i for share in shares for i in share[turn]]
        assert together == whole[turn * 12 : turn * 12 + 12]
    assert min(whole) >= 0


def test_like_lengths_come_together() -> None:
    lengths = [10, 1, 9, 2, 8, 3, 7, 4]
    order = list(RepeatedOrder(lengths, 5, "by length", 2, 1, 1))
    pairs = [{lengths[a], lengths[b]} for a, b in zip(order[::2], order[1::2], strict=True)]
    assert sorted(map(max, pairs)) == [2, 4, 8, 10]
