"""Packs: nothing lost, nothing leaked, the same losses and gradients as one by one."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.train.data import IGNORED, Packs, Sample, collate, count, pack

from ..conftest import make_model


def sample(length: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 262, (length,), generator=generator).tolist()
    prompt = max(1, length // 3)
    return Sample(ids, [IGNORED] * prompt + ids[prompt:])


@given(
    st.lists(st.integers(1, 40), max_size=60),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 70),
)
@settings(deadline=None, max_examples=200)
def test_packs_hold_every_sample_once_and_no_two_fit_together(
    lengths: list[int], most: int | None, window: int | None
) -> None:
    groups = pack(lengths, 40, most, window)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in g) for g in groups)
    assert all(size <= 40 for size in sizes)
    assert most is None or all(len(g) <= most for g in groups)
    if window is not None:
        assert all(min(g) // window == max(g) // window for g in groups)
    elif most is None and len(sizes) > 1:
        assert sizes[0] + sizes[1] > 40


def test_the_best_fit_is_taken() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_a_million_samples_are_packed_tightly_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(10, 2000, 1_000_000)
    begun = time.process_time()
    groups = pack(lengths, 2048)
    assert time.process_time() - begun < 20  # 2 s on an idle core; quadratic would be an hour
    assert sum(map(len, groups)) == len(lengths)
    assert lengths.sum() / (len(groups) * 2048) > 0.99


def test_a_sample_longer_than_a_pack() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit into 10"):
        pack([11], 10)


def test_packs_are_read_when_asked_for() -> None:
    samples = [sample(3, 0), sample(2, 1), sample(4, 2)]
    packs = Packs(samples, [[0, 2], [1]])
    assert len(packs) == 2
    assert packs[0] == [samples[0], samples[2]]
    assert list(packs[1:]) == [[samples[1]]]


def test_collation_of_packs() -> None:
    a, b, c = sample(3, 0), sample(2, 1), sample(4, 2)
    batch = collate([[a, b], [c]], pad_id=9, packing=True, length=6)
    assert batch["input_ids"].tolist() == [a.input_ids + b.input_ids + [9], [*c.input_ids, 9, 9]]
    assert batch["labels"].tolist() == [a.labels + b.labels + [-100], [*c.labels, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert "attention_mask" not in batch
    assert count([[a, b], [c]]) == (9, a.trained + b.trained + c.trained)


def test_collation_without_packing_and_the_width() -> None:
    batch = collate([[sample(3, 0)], [sample(70, 1)]], pad_id=9, packing=False, length=512)
    assert batch["input_ids"].shape == (2, 128)
    assert batch["attention_mask"].sum(1).tolist() == [3, 70]
    assert collate([[sample(70, 1)]], 9, False, length=100)["input_ids"].shape == (1, 100)
    assert collate([[sample(3, 0)]], 9, False, length=100, full=True)["labels"].shape == (1, 100)
    assert collate([[sample(70, 1)]], 9, False, length=50, full=True)["labels"].shape == (1, 70)
    assert collate([[sample(64, 1)]], 9, False, length=512)["labels"].shape == (1, 64)


@pytest.mark.parametrize(
    ("sizes", "length", "width"),
    [((64, 64), 512, 128), ((3, 64), 512, 64), ((64, 64), 100, 100), ((100, 100), 100, 100),
     ((3, 70), 512, 128)],
)  # fmt: skip
def test_a_mask_that_hides_something(sizes: tuple[int, int], length: int, width: int) -> None:
    packs = [[sample(size, 0)] for size in sizes]
    batch = collate(packs, 9, packing=False, length=length, hides=True)
    assert batch["labels"].shape == (2, width)
    assert bool(batch["attention_mask"].all()) == (min(sizes) == length)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_losses_and_gradients_equal_those_of_single_samples(attention: str) -> None:
    model = make_model(attn_implementation=attention)
    samples = [sample(n, n) for n in (17, 30, 5, 41, 2)]
    total = sum(s.trained for s in samples)

    def grads() -> list[torch.Tensor]:
        out = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return out

    single = []
    for s in samples:
        one = collate([[s]], 0, False, length=41)
        loss = model(**one).loss * s.trained / total
        loss.backward()
        single.append(float(loss.detach()))
    expected = grads()
    packs = list(Packs(samples, pack([len(s.input_ids) for s in samples], 60)))
    assert max(map(len, packs)) > 1
    packed = model(**collate(packs, 0, True, length=64)).loss
    packed.backward()
    assert float(packed.detach()) == pytest.approx(sum(single), rel=1e-6)
    for a, b in zip(grads(), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
    # each sample alone, too: only its own labels count
    for s, alone in zip(samples, single, strict=True):
        masked = [
            [x if x is s else Sample(x.input_ids, [IGNORED] * len(x.labels)) for x in p]
            for p in packs
        ]
        with torch.no_grad():
            loss = model(**collate(masked, 0, True, length=64)).loss
        assert float(loss) == pytest.approx(alone * total / s.trained, rel=1e-6)
    # and the comparison can fail: without positions the samples see each other
    batch = collate(packs, 0, True, length=64)
    del batch["position_ids"]
    assert float(model(**batch).loss.detach()) != pytest.approx(sum(single), rel=1e-6)
