from __future__ import annotations

import os
import time

import pytest

from .load import Limit, stretched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time and the load, on a machine with two cores."""
    state = {"now": 100.0, "load": 0.5}
    monkeypatch.setattr(time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(os, "getloadavg", lambda: (state["load"], 9.0, 9.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return state


def test_a_limit_grows_with_the_processes_that_wait_for_a_core(clock: dict[str, float]) -> None:
    assert stretched(10) == 10
    clock["load"] = 9.0
    assert stretched(10) == 45


def test_time_on_a_busy_machine_counts_less(clock: dict[str, float]) -> None:
    limit = Limit(60)
    clock["now"] += 20
    assert limit.left() == 40
    clock["load"] = 8.0
    clock["now"] += 20
    assert limit.left() == 35
    clock["load"] = 0.0
    clock["now"] += 36
    assert limit.left() == 0
