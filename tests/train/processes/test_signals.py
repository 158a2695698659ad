"""A signal to one process of a run ends all of them at the same step."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from fusewright.train.processes.signals import Interrupts, Stopped, heeded
from fusewright.train.processes.world import World

from .ranks import run_ranks, values

STEPS = 6


def _train(world: World, plan: dict[tuple[int, int], list[str]]) -> dict[str, Any]:
    """Steps with an agreement after each; ``plan`` says which rank gets which signals at which."""
    seen: list[int | None] = []
    with Interrupts(world) as interrupts, interrupts.deferring_signals():
        for step in range(STEPS):
            for name in plan.get((world.rank, step), ()):
                signal.raise_signal(getattr(signal, name))
                seen.append(interrupts.signal)
            interrupts.agree()
            if interrupts.signal is not None:
                break
        return {"step": step, "signal": interrupts.signal, "seen": seen}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_them_ends_all_at_the_same_step(rank: int) -> None:
    found = values(_train, {(rank, 2): ["SIGTERM"]})
    assert [f["step"] for f in found] == [2, 2]
    assert [f["signal"] for f in found] == [signal.SIGTERM] * 2
    # until they agree it is no one's
    assert found[rank]["seen"] == [None]
    assert found[1 - rank]["seen"] == []


def test_several_signals_are_one_of_them_for_all() -> None:
    found = values(_train, {(0, 3): ["SIGINT"], (1, 3): ["SIGTERM"]})
    assert [(f["step"], f["signal"]) for f in found] == [(3, signal.SIGTERM)] * 2


def _between(world: World) -> dict[str, Any]:
    """A signal to rank 1 outside of any agreement, and none for a while."""
    with Interrupts(world) as interrupts:
        with interrupts.deferring_signals():
            interrupts.agree()
            before = interrupts.signal
            if world.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            world.sums([1.0])
        waiting = interrupts.signal
        interrupts.agree()
        first = interrupts.signal
        interrupts.agree()  # nothing changes any more
        return {"signals": [before, waiting, first, interrupts.signal]}


def test_a_signal_between_two_agreements_is_not_lost() -> None:
    for found in values(_between):
        assert found["signals"] == [None, None, signal.SIGTERM, signal.SIGTERM]


def test_a_second_signal_quits_that_process_and_with_it_the_others() -> None:
    ended = run_ranks(_train, {(1, 2): ["SIGINT", "SIGINT"]})
    assert ended[1].error == "Stopped"
    assert ended[0].error == "ProcessLostError"


def _loading(world: World) -> None:
    with Interrupts(world):
        if world.rank == 0:
            signal.raise_signal(signal.SIGTERM)
        world.share(lambda: 0)


def test_outside_of_training_a_signal_quits_at_once() -> None:
    first, second = run_ranks(_loading)
    assert (first.error, first.said) == ("Stopped", "SIGTERM")
    assert second.error == "SystemExit"


def _loading_both(world: World) -> None:
    world.most(0)  # connected
    with Interrupts(world):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_to_all_of_them_is_said_once() -> None:
    first, second = run_ranks(_loading_both)
    assert (first.error, first.said) == ("Stopped", "SIGTERM")
    assert (second.error, second.said) == ("SystemExit", "143")


def test_one_message_of_rank_0() -> None:
    assert values(_says) == [True, False]


def _says(world: World) -> bool:
    """Whether a line is written to standard error."""
    reading, writing = os.pipe()
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        with Interrupts(world) as interrupts, interrupts.deferring_signals():
            signal.raise_signal(signal.SIGINT)
            interrupts.agree()
    finally:
        os.dup2(kept, 2)
        os.close(writing)
    with os.fdopen(reading) as file:
        return Interrupts.STOPPING in file.read()


# --- one process ---------------------------------------------------------------------------------


def test_one_process_needs_no_agreement() -> None:
    with Interrupts() as interrupts, interrupts.deferring_signals():
        interrupts.agree()
        assert interrupts.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM
        interrupts.agree()
        assert interrupts.signal == signal.SIGTERM
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_a_terminal_that_is_closed_under_nohup_ends_nothing() -> None:
    hangup, before = signal.SIGHUP, signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(hangup, signal.SIG_DFL)
        assert heeded() == [signal.SIGINT, signal.SIGTERM, hangup]
        signal.signal(hangup, signal.SIG_IGN)
        assert heeded() == [signal.SIGINT, signal.SIGTERM]
        with Interrupts() as interrupts, interrupts.deferring_signals():
            signal.raise_signal(hangup)
            assert interrupts.signal is None
        assert signal.getsignal(hangup) == signal.SIG_IGN
    finally:
        signal.signal(hangup, before)
