from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fusewright.errors import OptimizeError
from fusewright.kernels.loss.head_tiles import TILE_BYTES, most_logits
from fusewright.memory.budget import GB, Budget
from fusewright.memory.choice import PlanInputs, Scaled, choose, on_host, peak
from fusewright.memory.levels import HOSTED, Level
from fusewright.memory.levels import LEVELS as EVERY_LEVEL
from fusewright.memory.oom_retry import is_out_of_memory, retrying
from fusewright.memory.planner import Planner
from fusewright.memory.predict import Predicted
from fusewright.memory.usage import Usage

MB = GB // 1000
LEVELS = tuple(v for v in EVERY_LEVEL if v not in HOSTED and v != "weights")
"""Those of a device that is its own host."""


def _usages(all_: int, products: int, lean: int, flops: int = 100) -> dict[Level, Usage]:
    """A block's bytes at each level; at the leanest, forward is computed again."""
    sizes: dict[Level, int] = {"all": all_, "products": products, "input": lean, "tiles": lean}
    work: dict[Level, int] = {"all": 3, "products": 3, "input": 4, "tiles": 5}
    return {v: Usage(sizes[v], all_, all_ + 10, 0, work[v] * flops) for v in LEVELS}


def _with_host(usages: dict[Level, Usage]) -> dict[Level, Usage]:
    """The same, and what copying the input away gives: two of it in passing, none kept."""
    for level, graph in HOSTED.items():
        u, size = usages[graph], usages[graph].saved
        usages[level] = Usage(
            0, u.forward + 2 * size, u.backward + 2 * size, 0, u.flops + 1, host=size
        )
    return usages


def _setting(budget: int | None, **changes: Any) -> PlanInputs:
    given = {"base": 1000, "training": 100, "head": 50, "budget": budget, "allowed": LEVELS}
    return PlanInputs(**(given | changes))


class _Meter:
    device = torch.device("cpu")

    def __init__(self, peak: int | None = None) -> None:
        self._peak = peak

    def start(self) -> None:
        pass

    def peak(self) -> int | None:
        return self._peak

    def used(self) -> int:
        return 0


def _planner(memory: str, blocks: list[nn.Module], measured: int | None = None) -> Planner:
    meter: Any = _Meter(measured)
    model = nn.ModuleList(blocks)
    made = Planner(Budget.parse(memory), weakref.ref(model), weakref.WeakSet(blocks), meter, LEVELS)
    made.__dict__["keeps_alive"] = model
    return made


def test_without_a_limit_everything_is_kept() -> None:
    assert choose([_usages(100, 60, 10)] * 3, _setting(None)) == ["all"] * 3


def test_what_costs_no_product_goes_first() -> None:
    usages = [_usages(100, 60, 10)] * 4
    everything = peak(["all"] * 4, usages, _setting(None))
    chosen = choose(usages, _setting(everything - 60))
    assert sorted(chosen) == ["all", "all", "products", "products"]
    assert peak(chosen, usages, _setting(None)) <= everything - 60


def test_the_block_that_saves_most_for_its_work_goes_first() -> None:
    cheap, dear = _usages(100, 100, 10, flops=10), _usages(100, 100, 10, flops=1000)
    full = peak(["all"] * 2, [dear, cheap], _setting(None))
    assert choose([dear, cheap], _setting(full - 20)) == ["all", "input"]


def test_a_plan_within_the_budget_is_within_the_budget() -> None:
    usages = [_usages(100 + 7 * i, 60 + 3 * i, 10) for i in range(9)]
    low, high = (peak([v] * 9, usages, _setting(None)) for v in ("input", "all"))
    for budget in range(low, high + 50, 13):
        assert peak(choose(usages, _setting(budget)), usages, _setting(budget)) <= budget


def test_what_the_allocator_holds_grows_with_what_is_kept() -> None:
    usages, setting = [_usages(100, 60, 10)] * 4, _setting(None)
    loose = replace(setting, slack=0.5)
    for level, kept in (("all", 400), ("input", 40)):
        levels: list[Level] = [level] * 4  # type: ignore[list-item]
        assert peak(levels, usages, loose) - peak(levels, usages, setting) == kept // 2


def test_inputs_move_to_the_host_where_nothing_else_fits() -> None:
    usages = [_with_host(_usages(100, 60, 10)) for _ in range(9)]
    setting = _setting(None, allowed=EVERY_LEVEL, host=1000)
    for budget in range(peak(["offload"] * 9, usages, setting), 2200, 7):
        limited = _setting(budget, allowed=EVERY_LEVEL, host=1000)
        chosen = choose(usages, limited)
        assert peak(chosen, usages, limited) <= budget
        if peak(["input"] * 9, usages, limited) <= budget:
            assert not HOSTED.keys() & set(chosen)
        else:
            assert "offload" in chosen
            assert not {"all", "products"} & set(chosen)


def test_logits_grow_no_further_than_their_tiles() -> None:
    usages, nothing = [_usages(0, 0, 0)], _setting(None, head=7 * MB, base=0, training=0)
    small = replace(nothing, logits=2 * TILE_BYTES // 10)
    assert peak(["all"], usages, small) == 7 * MB + 2 * TILE_BYTES // 10
    assert peak(["all"], usages, small.scaled(5)) == 35 * MB + TILE_BYTES // 10 * 10
    assert peak(["all"], usages, small.scaled(50)) == 350 * MB + 2 * TILE_BYTES
    on_a_gpu = replace(small, tiles=most_logits(on_cpu=False))
    assert peak(["all"], usages, on_a_gpu.scaled(500)) == 3500 * MB + (256 << 20)


def test_the_host_has_a_limit_of_its_own() -> None:
    usages = [_with_host(_usages(100, 60, 10)) for _ in range(9)]
    for host, moved in ((0, 0), (9, 0), (10, 1), (35, 3), (90, 9), (900, 9)):
        chosen = choose(usages, _setting(0, allowed=EVERY_LEVEL, host=host))
        assert sum(v in HOSTED for v in chosen) == moved
        assert on_host(chosen, usages) == 10 * moved
    more = Scaled(usages[0], 2).get("offload")
    assert more is not None
    assert more.host == 20


def test_checkpoints_of_the_users_are_respected() -> None:
    assert (
        choose([_usages(100, 60, 10)] * 2, _setting(None, allowed=LEVELS[1:])) == ["products"] * 2
    )


def test_too_small_a_budget_names_one_that_is_enough() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(4)]
    usages = _usages(300 * MB, 200 * MB, 20 * MB)
    setting = PlanInputs(GB, 0, 0, int(0.5 * GB), LEVELS)
    with pytest.raises(
        OptimizeError, match=r"memory='0\.5GB' is too small.*memory='(\d\.\d)GB'"
    ) as e:
        _planner("0.5GB", blocks).plan(blocks[0], usages, setting)
    enough = Budget.parse(str(e.value).rpartition("memory='")[2].split("'")[0])
    assert enough.bytes is not None
    again = _planner(enough.text, blocks)
    again.plan(blocks[0], usages, PlanInputs(GB, 0, 0, enough.bytes, LEVELS))
    assert again.predicted is not None
    assert again.predicted <= enough.bytes <= again.predicted + GB / 10


@pytest.mark.parametrize(("measured", "again"), [(1100, False), (1900, True), (None, False)])
def test_a_wrong_prediction_leads_to_one_new_plan(measured: int | None, again: bool) -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(2)]
    usages = _usages(300 * MB, 200 * MB, 20 * MB)
    planner = _planner("1.8GB", blocks, None if measured is None else measured * MB)
    planner.begin(blocks[0], 64)
    planner.plan(blocks[0], usages, PlanInputs(400 * MB, 0, 0, int(1.8 * GB), LEVELS))
    assert set(planner.levels.values()) == {"all"}
    planner.begin(blocks[1], 64)
    planner.begin(blocks[0], 64)  # one more batch of the same step, or the same block again
    assert planner.measured is None
    _optimizer_step(planner)
    planner.begin(blocks[0], 64)
    assert planner.measured == (None if measured is None else measured * MB)
    assert ("all" not in planner.levels.values()) == again
    assert ("planned again" in planner.describe()) == again
    before = dict(planner.levels)
    _optimizer_step(planner)
    planner.begin(blocks[0], 64)
    assert dict(planner.levels) == before


def test_more_tokens_get_a_plan_of_their_own() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(2)]
    planner = _planner("1.8GB", blocks)
    planner.begin(blocks[0], 22)
    planner.plan(
        blocks[0], _usages(300 * MB, 200 * MB, 20 * MB), PlanInputs(0, 0, 0, int(1.8 * GB), LEVELS)
    )
    small = planner.predicted
    planner.begin(blocks[0], 20)
    assert planner.predicted == small
    assert set(planner.levels.values()) == {"all"}
    planner.begin(blocks[0], 88)
    assert planner.levels
    assert "all" not in planner.levels.values()
    with pytest.raises(OptimizeError, match="too small"):
        planner.begin(blocks[0], 8800)


@pytest.mark.parametrize("reported", [False, True])
def test_a_batch_too_large_for_the_budget_ends_no_run_that_has_begun(reported: bool) -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(2)]
    planner = _planner("1.8GB", blocks)
    planner.begin(blocks[0], 22)
    planner.plan(
        blocks[0], _usages(300 * MB, 200 * MB, 20 * MB), PlanInputs(0, 0, 0, int(1.8 * GB), LEVELS)
    )
    if reported:  # a step with a learning rate of zero leaves no other mark
        planner.on_optimizer_step()
    else:
        _optimizer_step(planner)
    planner.begin(blocks[0], 8800)
    assert set(planner.levels.values()) == {"input"}  # tiles would save nothing more here
    assert "even the leanest plan may need" in planner.describe()
    planner.begin(blocks[0], 88000)  # and no second one either
    assert set(planner.levels.values()) == {"input"}


def test_levels_that_cannot_run_are_not_chosen() -> None:
    usages = _usages(100, 60, 10)
    del usages["products"]
    full = peak(["all"] * 2, [usages] * 2, _setting(None))
    assert choose([usages] * 2, _setting(full - 1)) == ["input", "all"]


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_level_that_cannot_be_predicted_is_told() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    notes: list[str] = []
    assert Predicted(graph, [], "eager", notes.append).get("all") is None
    assert "a block at 'all' could not be predicted (" in notes[0]
    usages = _usages(100, 60, 10)
    del usages["all"]
    assert choose([usages], _setting(None)) == ["products"]


def _optimizer_step(planner: Planner) -> None:
    parameters = planner.trainable()
    for p in parameters:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(parameters, fused=True).step()
    for p in parameters:
        p.grad = None


@pytest.mark.parametrize("text", ["", "fast", "8", "8MB", "GB", "0GB", "-1GB", "8GBs"])
def test_a_memory_setting_that_means_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="'speed', 'auto', 'min' or a size in GB as in '8GB'"):
        Budget.parse(text)


def test_sizes() -> None:
    assert Budget.parse("7.5 GB").bytes == Budget.parse("7.5GiB").bytes == 7.5 * 2**30
    assert Budget.parse("auto").bytes is None


def test_the_first_step_is_repeated_with_less() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(2)]
    planner = _planner("auto", blocks)
    planner.plan(blocks[0], _usages(3, 2, 1), PlanInputs(0, 0, 0, None, LEVELS))
    weight, seen, drawn = nn.Parameter(torch.zeros(2)), [], []

    def run() -> str:
        planner.begin(blocks[0], 1)
        seen.append(planner.levels[blocks[1]])
        drawn.append(torch.rand(()).item())
        assert weight.grad is None
        weight.grad = torch.ones(2)
        if len(seen) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert retrying(planner, run, [weight]) == "done"
    assert seen == ["all", "products", "input"]
    assert planner.measured is None
    assert len(set(drawn)) == 1
    assert weight.grad is not None
    assert "out of memory" in planner.describe()
    with pytest.raises(torch.OutOfMemoryError):  # sums of gradients cannot be put back
        retrying(_planner("auto", blocks), _out_of_memory, [weight])


def test_other_errors_and_other_steps_are_not_repeated() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2)]
    calls = []

    def fails(error: Exception) -> None:
        calls.append(error)
        raise error

    for memory, error in (("auto", RuntimeError("shapes")), ("speed", MemoryError())):
        planner = _planner(memory, blocks)
        planner.plan(blocks[0], _usages(3, 2, 1), PlanInputs(0, 0, 0, None, LEVELS))
        with pytest.raises(type(error)):
            retrying(planner, lambda error=error: fails(error))
    assert len(calls) == 2
    assert not is_out_of_memory(RuntimeError("shapes"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
