"""The share of each process in rows to train on and to validate on: together they are all rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from fusewright.train.data import IGNORED, Sample, collate
from fusewright.train.data.order import Kind, Order
from fusewright.train.data.packing import Pack
from fusewright.train.data.ranks import Fillable, RankBatches, RankStream, filler
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.world import World
from fusewright.train.trainer.evaluation import Batches, validate

sizes = st.integers(1, 5)
numbers = st.integers(1, 6)
kinds = st.sampled_from(["shuffled", "in order", "by length"])


def _packs(lengths: list[int]) -> list[Pack]:
    """Each a sample of its own tokens, of which the first is not trained."""
    first = [10 * (1 + sum(lengths[:i])) for i in range(len(lengths))]
    return [
        [Sample(ids := list(range(at, at + n)), [IGNORED, *ids[1:]])]
        for at, n in zip(first, lengths, strict=True)
    ]


def _interleaved(shares: list[list[Any]]) -> list[Any]:
    return [batch for turn in zip(*shares, strict=True) for batch in turn]


# --- rows to train on ----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=40), size=sizes, ranks=numbers,
    drop_last=st.booleans(), epoch=st.integers(0, 3), kind=kinds, seed=st.integers(0, 9),
)  # fmt: skip
def test_the_batches_of_all_are_those_of_one_process(
    lengths: list[int], size: int, ranks: int, drop_last: bool, epoch: int, kind: Kind, seed: int
) -> None:
    def order() -> Order:
        made = Order(lengths, seed, kind, size)
        made.set_epoch(epoch)
        return made

    alone = list(BatchSampler(order(), size, drop_last))
    shares = []
    for rank in range(ranks):
        batches = RankBatches(Order(lengths, seed, kind, size), size, rank, ranks, drop_last)
        batches.set_epoch(epoch)
        shares.append(list(batches))
        assert len(batches) == len(shares[-1])
    # as many for each, in one process's order, and what is left over trains nothing
    together = _interleaved(shares)
    assert together[: len(alone)] == alone
    fillers = together[len(alone) :]
    assert len(fillers) < ranks
    assert all(len(batch) == 1 and batch[0] < 0 for batch in fillers)
    trained = [index for batch in together for index in batch if index >= 0]
    assert len(trained) == len(set(trained))
    if not drop_last:
        assert sorted(trained) == list(range(len(lengths)))


def test_each_epoch_has_its_own_order() -> None:
    batches = RankBatches(Order([1] * 20, 0, "shuffled", 2), 2, 1, 2, False)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(list(batches))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_loader_makes_of_them(workers: int) -> None:
    """Five batches for two processes: the sixth only fills."""
    packs = _packs([9, 12, 3, 20, 5])
    loaded = []
    for rank in range(2):
        batches = RankBatches(Order([0] * 5, 0, "in order", 1), 1, rank, 2, False)
        loader = DataLoader(
            Fillable(packs), batch_sampler=batches, num_workers=workers,
            collate_fn=lambda rows: collate(rows, 0, False, 32),
        )  # type: ignore[var-annotated, arg-type]  # fmt: skip
        loaded.append(list(loader))
    rows = _interleaved(loaded)
    assert [row["input_ids"][0, 0].item() for row in rows] == [p[0].input_ids[0] for p in packs] + [
        packs[0][0].input_ids[0]
    ]
    trained = [(row["labels"] != IGNORED).sum().item() for row in rows]
    assert trained == [8, 11, 2, 19, 4, 0]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_a_filler_is_short_and_trains_nothing(lengths: list[int]) -> None:
    pack = [sample for group in _packs(lengths) for sample in group]
    (sample,) = filler(pack)
    assert 1 <= len(sample.input_ids) <= 8
    assert sample.input_ids == pack[0].input_ids[:8]
    assert sample.trained == 0
    assert len(sample.labels) == len(sample.input_ids)
    packs = Fillable([pack])
    assert (packs[0], packs[~0]) == (pack, [sample])
    assert len(packs) == 1


# --- a stream ------------------------------------------------------------------------------------


class _Stream(IterableDataset[Pack]):
    """Endless; each worker of a data loader has a share of its rows."""

    def __iter__(self) -> Iterator[Pack]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ([Sample([i], [i])] for i in count(first, step))


@settings(deadline=None)
@given(size=sizes, ranks=numbers, turns=st.integers(1, 5))
def test_the_shares_of_a_stream(size: int, ranks: int, turns: int) -> None:
    shares = []
    for rank in range(ranks):
        packs = iter(RankStream(_Stream(), size, rank, ranks))
        shares.append([[p[0].input_ids[0] for p in islice(packs, size)] for _ in range(turns)])
    together = [index for batch in _interleaved(shares) for index in batch]
    assert together == list(range(size * ranks * turns))


def test_a_stream_that_workers_read() -> None:
    shares = []
    for rank in range(2):
        loader: Any = DataLoader(
            RankStream(_Stream(), 2, rank, 2), batch_size=2, num_workers=2,
            collate_fn=lambda packs: [p[0].input_ids[0] for p in packs],
        )  # fmt: skip
        shares.append(list(islice(loader, 4)))
    together = [index for batch in _interleaved(shares) for index in batch]
    assert sorted(together) == list(range(16))


# --- rows to validate on -------------------------------------------------------------------------


class _Model(nn.Module):
    """Its loss is the mean of a function of the trained tokens, NaN where there are none."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, input_ids: Any, labels: Any, **_: Any) -> Any:
        self.calls += 1
        shifted = labels[:, 1:]
        kept = shifted[shifted != IGNORED].double()
        return SimpleNamespace(loss=torch.sin(kept).mean())


class _Share(World):
    """One of several processes whose sums are added up by the test."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Placement(rank, size, rank, size))
        self.given: list[list[float]] = []

    def sums(self, values: Any) -> list[float]:
        self.given.append(list(values))
        return list(values)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=25), size=sizes, ranks=numbers,
    packing=st.booleans(),
)  # fmt: skip
def test_validation_adds_up_to_that_of_one_process(
    lengths: list[int], size: int, ranks: int, packing: bool
) -> None:
    packs = _packs(lengths)

    def batches(world: World | None) -> Batches:
        return Batches(packs, size, lambda rows: collate(rows, 0, packing, 64), world)

    alone, model = _Share(0, 1), _Model()
    expected = validate(model, {"eval": batches(None)}, world=alone)
    shares = [_Share(rank, ranks) for rank in range(ranks)]
    calls, made = [], []
    for share in shares:
        model = _Model().train()
        own = batches(share)
        validate(model, {"eval": own}, world=share)
        calls.append(model.calls)
        made.append(len(list(own)))
        assert len(own) == made[-1]
        assert model.training
    total, tokens = (sum(part) for part in zip(*(s.given[0] for s in shares), strict=True))
    ((whole, number),) = alone.given
    assert tokens == number == sum(n - 1 for n in lengths)
    assert total == pytest.approx(whole, abs=1e-9)
    if number:
        assert total / tokens == pytest.approx(expected["eval_loss"])
    # as many forward passes each: of sharded weights, all have to take part
    assert len(set(made)) == 1
    assert calls == made or ranks == 1  # one process leaves out what has nothing to add


def test_the_rows_of_a_filler_are_there_again_without_labels() -> None:
    packs = _packs([3, 4, 5])
    shares = [
        list(Batches(packs, 1, lambda rows: collate(rows, 0, False, 64), _Share(rank, 2)))
        for rank in range(2)
    ]
    assert [len(share) for share in shares] == [2, 2]
    last = shares[1][1]
    assert torch.equal(last["input_ids"], shares[0][1]["input_ids"])
    assert bool((last["labels"] == IGNORED).all())
    assert bool((shares[0][1]["labels"] != IGNORED).any())


def test_nothing_to_validate_on() -> None:
    batches = Batches([], 2, lambda rows: collate(rows, 0, False, 64), _Share(1, 2))
    assert (len(batches), list(batches)) == (0, [])
