"""How long a step takes on a device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusewright.train.plan.cards import CARDS, Card
from fusewright.train.plan.count.layout import ProcessLayout
from fusewright.train.plan.count.network import Traffic
from fusewright.train.plan.estimate import TrainingJob, estimate
from fusewright.train.plan.speed import Speed, speed

from .conftest import MakeRecipe, make_job

ONE = ProcessLayout("one process")
FAST = replace(CARDS["H100"], bandwidth=1e30, link=1e12, network=1e10)


def _speed(
    job: TrainingJob, card: Card, layout: ProcessLayout = ONE, sent: Traffic | None = None
) -> Speed:
    return speed(job, estimate(job, layout, None), layout, sent or Traffic(), card)


def test_a_step_takes_as_long_as_its_operations(recipe: MakeRecipe) -> None:
    job = make_job(recipe(gradient_accumulation_steps=4))
    found = _speed(replace(job, process=replace(job.process, is_host=False)), FAST)
    assert found.seconds == pytest.approx(found.flops / (0.45 * FAST.flops))
    assert found.tokens == 4 * 256
    assert found.tokens_per_second == found.tokens / found.seconds


def test_few_tokens_wait_for_the_weights(recipe: MakeRecipe) -> None:
    job = make_job(recipe())
    slow = replace(FAST, bandwidth=1.0)
    weights = sum(u.times * w.bytes for u in job.units for w in u.weights)
    assert _speed(job, slow).compute_seconds >= 3 * weights


@pytest.mark.parametrize(
    ("layout", "sent", "rate"),
    [
        (ProcessLayout("FSDP2", 8, shard=8), Traffic(weights=10**12), FAST.link),
        (ProcessLayout("FSDP2", 16, shard=16), Traffic(weights=10**12), FAST.network),
        (ProcessLayout("HSDP", 16, shard=8, replicate=2), Traffic(weights=10**12), FAST.link),
        (ProcessLayout("HSDP", 16, shard=8, replicate=2), Traffic(copies=10**12), FAST.network),
        (ProcessLayout("DDP", 8, replicate=8), Traffic(copies=10**12), FAST.link),
        (ProcessLayout("DDP", 16, replicate=16), Traffic(copies=10**12), FAST.network),
        (ProcessLayout("ZeRO-2", 16), Traffic(gradients=10**12), FAST.network),
    ],
)
def test_what_leaves_a_machine_takes_the_slower_link(
    layout: ProcessLayout, sent: Traffic, rate: float, recipe: MakeRecipe
) -> None:
    found = _speed(make_job(recipe()), FAST, layout, sent)
    assert found.network_seconds == pytest.approx(10**12 / rate)
    assert found.seconds >= found.network_seconds
