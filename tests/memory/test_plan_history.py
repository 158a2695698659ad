"""One plan's life: how it is made, told, grown, corrected and made leaner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fusewright.errors import OptimizeError
from fusewright.memory.budget import GB
from fusewright.memory.choice import PlanInputs, peak

from .test_planner import EVERY_LEVEL, LEVELS, MB, _planner, _setting, _usages, _with_host

SMALL = _usages(3, 2, 1)


def _blocks(count: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(count)]


def test_modes_that_need_no_plan() -> None:
    blocks = _blocks(2)
    assert _planner("speed", blocks).level(blocks[0]) == "all"
    assert _planner("min", blocks).level(blocks[0]) == "input"
    assert _planner("auto", blocks).level(blocks[0]) is None
    checkpointed = _planner("speed", blocks)
    checkpointed.allowed = LEVELS[1:]
    assert checkpointed.level(blocks[0]) == "products"
    assert checkpointed.describe() == "speed: 2 blocks keep matrix products"


def test_a_part_that_is_no_block_keeps_what_most_blocks_do() -> None:
    blocks, other = _blocks(3), nn.Linear(2, 2)
    planner = _planner("auto", blocks)
    for block, level in zip(blocks, ("all", "products", "products"), strict=True):
        planner.levels[block] = level
    assert planner.level(other) == "products"
    assert planner.level(blocks[0]) == "all"


def test_parameters_that_are_trained() -> None:
    blocks = _blocks(2)
    blocks[0].weight.requires_grad_(False)
    blocks[1].weight = blocks[0].bias
    planner = _planner("auto", blocks)
    assert [p.shape for p in planner.trainable()] == [(2,), (2,)]
    planner.model = lambda: None
    assert planner.trainable() == []


def test_a_decision_is_noted_once() -> None:
    planner = _planner("auto", _blocks(1))
    for text in ("one", "two", "one"):
        planner.note(text)
    planner.offload.note("two")
    assert planner.describe() == "auto: nothing is planned yet; one; two"


def test_the_plan_is_made_from_the_first_block() -> None:
    blocks = _blocks(4)
    usages = _usages(100, 60, 10)
    budget = peak(["input"] * 4, [usages] * 4, _setting(None))
    planner = _planner("auto", blocks)
    planner.begin(blocks[0], 1)
    assert planner.plan(blocks[0], usages, _setting(budget)) == "input"
    assert (planner.first, planner.predicted) == ("input", budget)
    larger = _usages(10_000, 6_000, 1_000)
    assert planner.plan(blocks[1], larger, _setting(budget)) == "input"
    assert planner.predicted == budget  # a second block does not change it
    assert planner._usages(blocks[1]) is larger
    assert planner._usages(blocks[2]) in (usages, larger)


def test_a_block_is_taken_to_be_like_those_of_its_class() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2), nn.Embedding(2, 2), nn.Embedding(2, 2), nn.ReLU()]
    planner = _planner("auto", blocks)
    linear, embedding = _usages(3, 2, 1), _usages(6, 4, 2)
    planner.plan(blocks[0], linear, _setting(None))
    planner.plan(blocks[1], embedding, _setting(None))
    found = [planner._usages(b) for b in blocks]
    assert [f is linear for f in found] == [True, False, False, True]
    assert [f is embedding for f in found] == [False, True, True, False]


def test_an_outlook_on_more_tokens() -> None:
    blocks = _blocks(2)
    planner = _planner("auto", blocks)
    assert planner.outlook(2.0) is None
    planner.plan(blocks[0], _usages(100, 60, 10), _setting(None))
    outlook = planner.outlook(2.5)
    assert outlook is not None
    usages, setting = outlook
    assert [u.get("all").saved for u in usages] == [250, 250]
    assert setting.head == 125
    assert planner.predicted == peak(["all"] * 2, [_usages(100, 60, 10)] * 2, _setting(None))


def test_auto_goes_over_what_there_is_and_says_so() -> None:
    blocks = _blocks(2)
    planner = _planner("auto", blocks)
    usages = _usages(300 * MB, 200 * MB, 100 * MB)
    assert planner.plan(blocks[0], usages, PlanInputs(0, 0, 0, GB // 10, LEVELS)) == "input"
    assert planner.notes == [
        "even the leanest plan may need 0.40 GiB, more than the 0.10 GiB that there is"
    ]
    assert planner.describe() == (
        f"auto: 2 blocks keep their input; predicted peak 0.40 GiB; {planner.notes[0]}"
    )


def test_a_plan_that_just_fits_is_no_plan_too_many() -> None:
    blocks = _blocks(2)
    usages = _usages(100, 60, 10)
    exact = peak(["input"] * 2, [usages] * 2, _setting(None))
    planner = _planner("1GB", blocks)
    planner.plan(blocks[0], usages, _setting(exact))
    assert planner.notes == []
    refused = _planner("1GB", blocks)
    with pytest.raises(OptimizeError):
        refused.plan(blocks[0], usages, _setting(exact - 1))
    assert refused.level(blocks[0]) is None


@pytest.mark.parametrize(
    ("base", "named"),
    [(123 * GB // 100, "1.3GB"), (12 * GB // 10, "1.2GB"), (12 * GB // 10 + 1, "1.3GB")],
)
def test_the_smallest_budget_is_rounded_up(base: int, named: str) -> None:
    blocks = _blocks(1)
    nothing = _usages(0, 0, 0)
    nothing = {k: type(v)(0, 0, 0, 0, 0) for k, v in nothing.items()}
    with pytest.raises(OptimizeError, match=f"memory='{named}'; or use fewer"):
        _planner("1GB", blocks).plan(blocks[0], nothing, PlanInputs(base, 0, 0, GB, LEVELS))


def test_inputs_in_host_memory_are_told() -> None:
    blocks = _blocks(9)
    planner = _planner("auto", blocks)
    usages = _with_host(_usages(300 * MB, 200 * MB, 100 * MB))
    setting = PlanInputs(0, 0, 0, 501 * MB, EVERY_LEVEL, host=GB)
    assert planner.plan(blocks[0], usages, setting) == "offload"
    assert planner.host == 900 * MB
    told = "auto: 9 blocks keep their input in host memory (0.90 GiB); predicted peak 0.50 GiB"
    assert planner.describe() == told


# ------------------------------------------------------------------------------------- more tokens


@pytest.mark.parametrize(("first", "then", "factor"), [(1, 2, 2.0), (20, 30, 1.5), (40, 100, 2.5)])
def test_a_plan_grows_with_the_tokens(first: int, then: int, factor: float) -> None:
    blocks = _blocks(2)
    planner = _planner("auto", blocks)
    planner.begin(blocks[0], first)
    planner.plan(blocks[0], _usages(1000, 600, 100), _setting(None, base=0, training=0, head=0))
    before = planner.predicted
    planner.begin(blocks[1], first)
    assert planner.predicted == before
    planner.begin(blocks[0], then)
    assert before is not None
    assert planner.predicted == before * factor
    planner.begin(blocks[0], then)
    planner.begin(blocks[0], first)
    assert planner.predicted == before * factor


def test_the_step_of_a_larger_batch_counts_as_the_first() -> None:
    blocks = _blocks(2)
    planner = _planner("auto", blocks, measured=77)
    planner.begin(blocks[0], 10)
    planner.plan(blocks[0], SMALL, _setting(None))
    _moved(planner, 1)
    planner.begin(blocks[0], 10)
    assert planner.measured == 77
    assert not planner.may_retry()
    planner.begin(blocks[1], 20)
    assert planner.measured is None
    assert planner.may_retry()
    _moved(planner, 1)
    planner.begin(blocks[0], 20)  # another block came first
    assert planner.measured is None
    planner.begin(blocks[1], 20)
    assert planner.measured == 77


# -------------------------------------------------------------------------------- the first step


def _moved(planner: Any, by: float) -> None:
    """What an optimizer does, without leaving a mark."""
    with torch.no_grad():
        for p in planner.trainable():
            p.data.copy_(p.data.abs() + 2 * max(-by, 0) + by)


@pytest.mark.parametrize("by", [0.5, -0.5])
def test_a_step_has_ended_when_a_parameter_has_moved(by: float) -> None:
    blocks = [nn.Linear(10, 10), nn.Linear(10, 10)]
    planner = _planner("auto", blocks, measured=5)
    for p in planner.trainable():
        p.data.fill_(4)
    planner.begin(blocks[0], 1)
    planner.plan(blocks[0], SMALL, _setting(None))
    planner.begin(blocks[0], 1)
    assert (planner.measured, planner.has_stepped) == (None, False)
    with torch.no_grad():
        for p in planner.trainable():
            p.data.add_(by)
    planner.begin(blocks[1], 1)
    assert planner.measured is None
    planner.begin(blocks[0], 1)
    assert (planner.measured, planner.has_stepped) == (5, True)


@pytest.mark.parametrize("by", [0.5, -0.5])
def test_a_larger_batch_after_a_step_ends_no_run(by: float) -> None:
    blocks = _blocks(1)
    planner = _planner("1GB", blocks)
    for p in planner.trainable():
        p.data.fill_(4)
    planner.begin(blocks[0], 1)
    planner.plan(blocks[0], _usages(300 * MB, 200 * MB, 100 * MB), PlanInputs(0, 0, 0, GB, LEVELS))
    with torch.no_grad():
        for p in planner.trainable():
            p.data.add_(by)
    planner.begin(blocks[0], 100)
    assert "even the leanest plan may need" in planner.describe()


def test_a_larger_batch_before_a_step_may_be_refused() -> None:
    blocks = _blocks(1)
    planner = _planner("1GB", blocks)
    planner.begin(blocks[0], 1)
    planner.plan(blocks[0], _usages(300 * MB, 200 * MB, 100 * MB), PlanInputs(0, 0, 0, GB, LEVELS))
    with pytest.raises(OptimizeError, match="too small for any plan"):
        planner.begin(blocks[0], 100)
    assert not planner.has_stepped


@pytest.mark.parametrize(
    ("measured", "note"),
    [
        (1000, None),
        (1100, None),
        (920, None),
        (1200, "the first step took 1.20 GiB where 1.00 GiB were predicted: the plan stays"),
        (500, "the first step took 0.50 GiB where 1.00 GiB were predicted: the plan stays"),
        (2900, "the first step took 2.90 GiB where 1.00 GiB were predicted: planned again"),
    ],
)
def test_what_was_measured_corrects_the_plan(measured: int, note: str | None) -> None:
    blocks = _blocks(2)
    planner = _planner("2.7GB", blocks, measured * MB)
    planner.begin(blocks[0], 1)
    usages = {k: type(v)(v.saved, v.saved, v.saved, 0, v.flops) for k, v in
              _usages(300 * MB, 200 * MB, 20 * MB).items()}  # fmt: skip
    planner.plan(blocks[0], usages, PlanInputs(400 * MB, 0, 0, 2700 * MB, LEVELS))
    assert planner.predicted == 1000 * MB
    _moved(planner, 1)
    planner.begin(blocks[0], 1)
    assert planner.notes == ([] if note is None else [note])
    if note is None:
        assert planner.predicted == 1000 * MB
        assert planner.describe().endswith(f"1.00 GiB, measured {measured / 1000:.2f} GiB")
    elif note.endswith("stays"):
        assert planner.predicted == measured * MB
    else:
        assert planner.predicted <= 2700 * MB


# ----------------------------------------------------------------------------------- out of memory


def test_every_block_goes_one_level_down() -> None:
    blocks = _blocks(2)
    planner = _planner("auto", blocks)
    assert not planner.leaner()  # there is no plan
    planner.begin(blocks[0], 1)
    planner.plan(blocks[0], SMALL, _setting(None))
    planner.levels[blocks[1]] = "input"
    assert planner.leaner()
    assert [planner.levels[b] for b in blocks] == ["products", "tiles"]
    assert planner.leaner()
    assert [planner.levels[b] for b in blocks] == ["input", "tiles"]
    assert planner.leaner()
    assert not planner.leaner()
    assert [planner.levels[b] for b in blocks] == ["tiles", "tiles"]
    assert planner.notes == ["out of memory in the first step: every block keeps less"]


def test_when_nothing_is_made_leaner() -> None:
    blocks = _blocks(1)
    asked = _planner("1GB", blocks)
    asked.begin(blocks[0], 1)
    asked.plan(blocks[0], SMALL, _setting(None))
    assert not asked.leaner()  # the budget is the user's
    done = _planner("auto", blocks)
    done.begin(blocks[0], 1)
    done.plan(blocks[0], SMALL, _setting(None))
    _moved(done, 1)
    done.begin(blocks[0], 1)
    assert not done.leaner()
    assert dict(done.levels) == {blocks[0]: "all"}


def test_parameters_without_values_show_no_step() -> None:
    blocks = _blocks(2)
    blocks[0].to("meta")
    planner = _planner("auto", blocks)
    planner.begin(blocks[0], 1)
    assert len(planner._stamp) == 2


def test_a_stepped_optimizer_is_asked_for_in_one_read() -> None:
    """On a GPU each number that is read is waited for, in each micro-batch of the first step."""
    blocks = _blocks(6)
    planner = _planner("auto", blocks)
    planner.begin(blocks[0], 1)
    assert len(planner._stamp) > 6
    with profile(activities=[ProfilerActivity.CPU]) as reads:
        planner.begin(blocks[0], 1)
    names = [e.name for e in reads.events()]
    assert names.count("aten::sum") == len(planner._stamp)
    assert "aten::_local_scalar_dense" not in names  # but one list of them all
