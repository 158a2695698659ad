"""States in the form of one process, and back: by number and by name, with and without groups."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusewright.train.processes import zero
from fusewright.train.processes.gather import by_name, by_number, names_by_group

Groups = list[list[str]]


@st.composite
def groups_of_names(draw: Any, empty: bool = True) -> Groups:
    """The names of parameters by group, at least one of them."""
    sizes = draw(st.lists(st.integers(0 if empty else 1, 4), min_size=1, max_size=5))
    sizes[draw(st.integers(0, len(sizes) - 1))] = draw(st.integers(1, 4))
    names = iter([f"layer.{i}.weight" for i in draw(st.permutations(range(sum(sizes))))])
    return [[next(names) for _ in range(size)] for size in sizes]


def _state(groups: Groups, skipped: int = 0) -> dict[str, Any]:
    """An optimizer's, by number; the first ``skipped`` parameters had no gradient yet."""
    number = sum(map(len, groups))
    first = [sum(map(len, groups[:i])) for i in range(len(groups))]
    return {
        "state": {i: {"step": 3.0, "exp_avg": f"of {i}"} for i in range(skipped, number)},
        "param_groups": [
            {"lr": 0.1 * (1 + at), "params": list(range(at, at + len(names)))}
            for at, names in zip(first, groups, strict=True)
        ],
    }


@given(groups=groups_of_names(), skipped=st.integers(0, 3))
def test_by_name_and_by_number_are_opposites(groups: Groups, skipped: int) -> None:
    state = _state(groups, skipped)
    before = copy.deepcopy(state)
    named = by_name(state, groups)
    assert by_number(named, groups) == state == before
    assert by_name(by_number(named, groups), groups) == named
    assert [group["params"] for group in named["param_groups"]] == groups
    flat = [name for names in groups for name in names]
    assert named["state"] == {
        name: state["state"][i] for i, name in enumerate(flat) if i in state["state"]
    }
    assert [g["lr"] for g in named["param_groups"]] == [g["lr"] for g in state["param_groups"]]


def test_a_state_of_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        by_name(_state([["a"], ["b"]]), [["a", "b"]])


def test_names_are_those_of_an_optimizer_of_torch() -> None:
    """What comes back is what ``load_state_dict`` takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    with_decay = [p for p in model.parameters() if p.ndim == 2]
    without = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": without, "weight_decay": 0.0}, {"params": []}, {"params": with_decay}]
    )
    groups = names_by_group(model, optimizer)
    assert groups == [["0.bias", "1.weight", "1.bias", "2.bias"], [], ["0.weight", "2.weight"]]
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    again = by_number(by_name(state, groups), groups)
    other = torch.optim.AdamW(
        [{"params": without, "weight_decay": 0.0}, {"params": []}, {"params": with_decay}]
    )
    other.load_state_dict(again)
    named = by_name(state, groups)["state"]
    for name, parameter in model.named_parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(named[name]["exp_avg"], optimizer.state[parameter]["exp_avg"])


# --- schedules of DeepSpeed, which leaves out groups without parameters --------------------------


def _schedule(rates: list[float]) -> dict[str, Any]:
    """A schedule's, with a list that has an entry per group, and values of other kinds."""
    return {
        "base_lrs": rates, "_last_lr": [r / 2 for r in rates], "lr_lambdas": [None for _ in rates],
        "last_epoch": 7, "_step_count": 8, "_get_lr_called_within_step": False,
        "others": [0.0] * (len(rates) + 7),
    }  # fmt: skip


@given(groups=groups_of_names())
def test_whole_and_own_schedules_are_opposites(groups: Groups) -> None:
    own = _schedule([float(i) for i, names in enumerate(groups) if names])
    before = copy.deepcopy(own)
    whole = zero.whole_schedule(own, groups)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        assert len(whole[name]) == len(groups)
    assert [whole["base_lrs"][i] for i, names in enumerate(groups) if names] == own["base_lrs"]
    for name in ("last_epoch", "_step_count", "_get_lr_called_within_step", "others"):
        assert whole[name] == own[name]
    assert zero.schedule_of_groups(whole, groups) == own == before


@given(groups=groups_of_names(empty=False))
def test_without_empty_groups_nothing_changes(groups: Groups) -> None:
    state = _schedule([float(i) for i in range(len(groups))])
    assert zero.whole_schedule(state, groups) == state
    assert zero.schedule_of_groups(state, groups) == state


@given(groups=groups_of_names())
def test_a_schedule_of_one_process_loads_what_whole_gives(groups: Groups) -> None:
    """As between one process, which has all groups, and DeepSpeed, which has the others."""

    def schedule(sizes: list[int]) -> Any:
        weights = [[nn.Parameter(torch.zeros(1)) for _ in range(size)] for size in sizes]
        optimizer = torch.optim.SGD([{"params": own} for own in weights], lr=0.5)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    all_groups = schedule([len(names) for names in groups])
    filled = schedule([len(names) for names in groups if names])
    for _ in range(3):
        all_groups.optimizer.step()
        all_groups.step()
    filled.load_state_dict(zero.schedule_of_groups(all_groups.state_dict(), groups))
    assert filled.get_last_lr() == [
        rate for rate, names in zip(all_groups.get_last_lr(), groups, strict=True) if names
    ]
    again = schedule([len(names) for names in groups])
    again.load_state_dict(zero.whole_schedule(filled.state_dict(), groups))
    assert again.get_last_lr() == all_groups.get_last_lr()


@given(groups=groups_of_names())
def test_groups_of_zero_are_numbered_as_in_one_process(groups: Groups) -> None:
    own = [{"lr": float(i), "params": ["flat"]} for i, names in enumerate(groups) if names]
    found = zero._numbered(own, groups)
    assert [g["params"] for g in found] == [g["params"] for g in _state(groups)["param_groups"]]
    rates = [g["lr"] for g, names in zip(found, groups, strict=True) if names]
    assert rates == [g["lr"] for g in own]
    assert own[0]["params"] == ["flat"]


def test_a_parameter_of_one_number_has_a_state_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values look like the counts of others."""
    model = nn.Module()
    model.scale, model.weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, 3))
    state = {
        "state": {
            i: {"step": torch.tensor(3.0), "exp_avg": torch.full(shape, 1.0 + i)}
            for i, shape in enumerate([(1,), (2, 3)])
        },
        "param_groups": [{"lr": 0.1, "params": [0, 1]}],
    }
    set_: list[tuple[str, str | None]] = []
    begun: list[set[str]] = []
    names = {id(p): name for name, p in model.named_parameters()}
    monkeypatch.setattr(zero, "_set", lambda p, value, key: set_.append((names[id(p)], key)))
    monkeypatch.setattr(zero, "_begin_state", lambda engine, example, whole: begun.append(whole))
    base = SimpleNamespace(param_groups=[{"lr": 0.5, "params": ["flat"]}])
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace(optimizer=base))
    zero.load_optimizer(engine, state, [["scale", "weight"]])
    assert set_ == [("scale", "exp_avg"), ("weight", "exp_avg")]
    assert begun == [{"exp_avg"}]
    assert base.param_groups == [{"lr": 0.1, "params": ["flat"]}]
