"""How the processes of a run agree, and how they learn that one of them is gone."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fusewright.errors import RecipeError
from fusewright.train.processes import world as world_module
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.world import PARENT, World, joined, lost

from .ranks import free_port, run_ranks, values

LOST = "ProcessLostError"


# --- one process ---------------------------------------------------------------------------------


def test_one_process_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("RANK", "WORLD_SIZE", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    with joined(None) as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
        assert world.main
        assert not world.several
        given = object()  # which no JSON could carry
        assert world.share(lambda: given) is given
        assert world.gather(given) == [given]
        assert world.sums([1, 2.5]) == [1, 2.5]
        assert world.most(-3) == -3
        world.wait_for_main()
        world.fail(RecipeError("wrong"))
    assert not dist.is_initialized()


def test_an_error_of_one_process_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="Connection reset by peer"), joined(None):
        raise RuntimeError("Connection reset by peer")


# --- several of them -----------------------------------------------------------------------------


def _groups(world: World) -> tuple[int, int, list[float]]:
    world.share_batches(2)
    return world.batch_rank, world.batch_ranks, world.sums([1.0, float(world.batch_rank)])


def test_processes_that_share_their_batches_count_once() -> None:
    assert values(_groups, size=4) == [(rank // 2, 2, [2.0, 1.0]) for rank in range(4)]


def _agree(world: World) -> dict[str, Any]:
    rank = world.rank
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(rank)
        return {"a": [1, 2.5, None], "rank": rank}

    return {
        "place": (world.rank, world.size, world.local_rank, world.local_size, world.main),
        "shared": [world.share(make), world.share(str), world.share(lambda: rank)],
        "made": made,
        "sums": world.sums([rank + 1, 0.5, 2.0**40 + rank]),
        "most": [world.most(rank), world.most(-rank), world.most(2**40 * rank)],
        "gathered": world.gather({"rank": rank, "text": "x" * (1 + 1000 * rank)}),
    }


def test_what_they_agree_on() -> None:
    first, second = values(_agree)
    assert first["place"] == (0, 2, 0, 2, True)
    assert second["place"] == (1, 2, 1, 2, False)
    for found, made in ((first, [0]), (second, [])):
        assert found["shared"] == [{"a": [1, 2.5, None], "rank": 0}, "", 0]
        assert found["made"] == made
        assert found["sums"] == [3, 1.0, 2.0**41 + 1]
        assert found["most"] == [1, 0, 2**40]
        assert [g["rank"] for g in found["gathered"]] == [0, 1]
        assert [len(g["text"]) for g in found["gathered"]] == [1, 1001]


def _impatient(world: World, seconds: float) -> None:
    """Let a collective take no longer from now on."""
    world.most(0)
    limit = datetime.timedelta(seconds=seconds)
    dist.distributed_c10d._set_pg_timeout(limit, dist.group.WORLD)


def _slow_first(world: World) -> float:
    """Rank 0 makes a value for longer than a collective may take, and ends after the others."""
    _impatient(world, 0.7)
    begun = time.monotonic()
    world.share(lambda: time.sleep(1.5))
    waited = time.monotonic() - begun
    if world.main:
        time.sleep(1.5)
    return waited


@pytest.mark.long
def test_what_rank_0_makes_may_take_longer_than_a_collective() -> None:
    first, second = run_ranks(_slow_first)
    assert (first.error, second.error) == ("", "")
    assert min(first.value, second.value) >= 1.4
    assert second.seconds >= 2.9  # the last one out is rank 0: a launcher stops the others then


def _leave(world: World, last: int) -> str:
    if world.rank == last:
        time.sleep(1.2)
    return world.share(lambda: "same")


@pytest.mark.parametrize("last", [0, 1])
def test_rank_0_may_own_the_store(last: int) -> None:
    """Under srun nobody else has it: it must be there until all have read what it holds."""
    assert values(_leave, last, agent=False) == ["same", "same"]


def _without_launcher(world: World, file: str) -> list[Any]:
    before = world.share(lambda: {"é": 1})
    world.most(0)
    if world.main:
        Path(file).write_text("")
    with contextlib.suppress(dist.DistNetworkError):
        for _ in range(1000):
            world._store.check(["anything"])
            time.sleep(0.02)
    return [before, world.share(lambda: {"é": [None, 2.5]}), world.sums([1.0])]


def test_a_launcher_that_was_killed_is_not_needed_to_save(tmp_path: Path) -> None:
    file = tmp_path / "file"
    found = values(_without_launcher, str(file), until=file)
    assert found == [[{"é": 1}, {"é": [None, 2.5]}, [2.0]]] * 2


def _one_per_machine(world: World, folder: str, step: int) -> list[str]:
    """What this process sees of the work of those before it on its machine."""
    place = Path(folder)
    seen: list[str] = []
    world.share(lambda: (place / "0").write_text(""))

    def work() -> None:
        own = range(world.rank - step * world.local_rank, world.rank, step)
        seen.extend(str(r) for r in own if (place / str(r)).exists())
        if not world.local_rank:
            time.sleep(0.3)
        (place / str(world.rank)).write_text("")

    if not world.main:
        world.one_per_machine(work)
    return seen


def test_the_first_process_of_each_machine_works_before_the_others_of_it(tmp_path: Path) -> None:
    found = values(_one_per_machine, str(tmp_path), 1, size=4, local=2)
    assert found == [[], ["0"], [], ["2"]]


def test_ranks_that_are_dealt_to_the_machines_one_by_one(tmp_path: Path) -> None:
    found = values(_one_per_machine, str(tmp_path), 2, size=4, local=2, dealt=True)
    assert found == [[], [], ["0"], ["1"]]


# --- failures ------------------------------------------------------------------------------------


def _fail_making(world: World) -> None:
    def make() -> None:
        raise RecipeError("base_model: there is no such model")

    world.share(make)


@pytest.mark.parametrize("agent", [True, False])
def test_one_message_where_rank_0_fails(agent: bool) -> None:
    first, second = run_ranks(_fail_making, agent=agent)
    assert (first.error, first.said) == ("RecipeError", "base_model: there is no such model")
    assert (second.error, second.said) == ("SystemExit", "2")
    assert max(first.seconds, second.seconds) < 10


def _fail_waiting(world: World) -> None:
    """Rank 0 fails by itself, while the other one already waits for the end of the run."""
    if world.main:
        time.sleep(0.3)
        raise KeyError("unforeseen")


def test_a_process_that_waits_learns_that_rank_0_has_failed() -> None:
    first, second = run_ranks(_fail_waiting)
    assert first.error == "KeyError"
    assert (second.error, second.said) == ("SystemExit", "2")


def _fail_together(world: World, *words: str) -> None:
    world.most(0)  # connected
    raise RecipeError(words[world.rank])


def test_the_same_words_of_all_are_said_once() -> None:
    first, second = run_ranks(_fail_together, "the same", "the same")
    assert (first.error, first.said) == ("RecipeError", "the same")
    assert (second.error, second.said) == ("SystemExit", "2")


def test_other_words_are_said_too() -> None:
    first, second = run_ranks(_fail_together, "one", "another")
    assert (first.error, first.said) == ("RecipeError", "one")
    assert (second.error, second.said) == ("RecipeError", "another")


def _fail_alone(world: World, which: int) -> None:
    if world.rank == which:
        raise RecipeError("only here")
    world.gather(0)


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_fails_alone_says_so_and_the_other_ends(which: int) -> None:
    ended = run_ranks(_fail_alone, which)
    assert (ended[which].error, ended[which].said) == ("RecipeError", "only here")
    other = ended[1 - which]
    if which == 0:  # what it said is the message
        assert (other.error, other.said) == ("SystemExit", "2")
    else:
        assert other.error == LOST
        assert "another process of this run has ended" in other.said
        assert "auto_resume_from_checkpoints: true" in other.said
        assert len(other.said.splitlines()) == 1


_COLLECTIVES: dict[str, Callable[[World], Any]] = {
    "sums": lambda world: world.sums([1.0]),
    "gather": lambda world: world.gather(1),
    "share": lambda world: world.share(lambda: 0),
}


def _killed(world: World, which: int, collective: str) -> None:
    world.most(0)  # connected
    if world.rank == which:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    _COLLECTIVES[collective](world)


@pytest.mark.parametrize(
    ("which", "collective"), [(1, "sums"), (1, "gather"), (0, "sums"), (0, "gather")]
)
def test_one_that_is_killed_is_missed_at_once(which: int, collective: str) -> None:
    ended = run_ranks(_killed, which, collective)
    assert ended[which].error == "signal 9"
    other = ended[1 - which]
    assert other.error == LOST, other
    assert "another process of this run has ended" in other.said
    assert other.seconds < 10


def test_one_that_waits_misses_a_rank_0_that_had_the_store() -> None:
    first, second = run_ranks(_killed, 0, "share", agent=False)
    assert first.error == "signal 9"
    assert second.error == LOST


def _asleep(world: World) -> None:
    _impatient(world, 0.7)
    if not world.main:
        time.sleep(2)
    world.most(0)


def test_one_that_does_not_answer_is_lost_after_the_time_out() -> None:
    first, _ = run_ranks(_asleep)
    assert first.error == LOST
    assert "auto_resume_from_checkpoints" in first.said


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),  # whoever reads the output has gone away
        ConnectionError("HTTPSConnectionPool: Connection refused"),  # by the hub
        RuntimeError("CUDA out of memory"),
        KeyboardInterrupt("SIGINT"),
    ],
)
def test_an_error_that_has_nothing_to_do_with_the_others_stays(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, world_module._losses():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistNetworkError("anything"), True),
        (dist.DistStoreError("wait timeout after 2000ms, keys: /group/0//cpu//0/1"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError(), False),
    ],
)
def test_what_says_that_a_process_is_gone(error: Exception, said: bool) -> None:
    assert lost(error) == said


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """The store of a run whose rank 1 this process is, when it joins the others."""
    store = dist.HashStore()
    monkeypatch.setattr(world_module, "placement", lambda environ: Placement(1, 2, 1, 2))
    monkeypatch.setattr(world_module, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(world_module, "_TIMEOUT_S", 0.2)
    return store


@pytest.mark.parametrize("said", [True, False])
def test_rank_0_may_fail_before_the_others_are_connected(
    said: bool, second_of_two: dist.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any, **options: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with Connection closed by peer [::1]:1")

    monkeypatch.setattr(dist, "init_process_group", refused)
    monkeypatch.setattr(world_module, "_runs", itertools.count(1))
    if said:
        second_of_two.set("run-1/fusewright/failed-0", '"no such model"')
    expected = SystemExit if said else world_module.ProcessLostError
    with pytest.raises(expected), joined(1):
        raise AssertionError("joined nobody")


def test_one_that_never_comes(second_of_two: dist.HashStore) -> None:
    with pytest.raises(world_module.ProcessLostError, match="another process"), joined(1):
        raise AssertionError("joined nobody")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in {
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1]),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        with pytest.raises(RecipeError, match="is in use by another program"), joined(1):
            raise AssertionError("joined nobody")


def test_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            world_module.ProcessLostError, match=r"rank 1 of 2 cannot reach rank 0 at 127\.0\.0\.1:"
        ),
        joined(1),
    ):
        raise AssertionError("joined nobody")
    assert not dist.is_initialized()


def test_a_process_whose_launcher_is_gone_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, "1")
    monkeypatch.setattr(world_module, "placement", lambda environ: Placement(0, 2, 0, 2))
    with pytest.raises(SystemExit) as ended, joined(1):
        raise AssertionError("joined nobody")
    assert ended.value.code == 1


CHILD = """
import os, signal, sys, time
from fusewright.train.processes.world import end_with_parent
came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
end_with_parent()
end_with_parent()
print("ready", flush=True)
for _ in range(600):
    if came:
        break
    time.sleep(0.05)
time.sleep(1.5)  # for another one
with open(sys.argv[1], "w") as file:
    file.write(f"{len(came)} of {os.getpid()}")
"""

PARENT_CODE = """
import os, subprocess, sys, threading, time
os.environ["FUSEWRIGHT_PARENT"] = str(os.getpid())
for _ in range(8):  # Linux hands a child on from thread to thread, as they end
    threading.Thread(target=time.sleep, args=(600,)).start()
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(600)
"""


def test_the_end_of_a_launcher_with_threads_is_one_signal(tmp_path: Path) -> None:
    file = tmp_path / "came"
    command = [sys.executable, "-c", PARENT_CODE, CHILD, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        launcher.kill()
        launcher.wait()
        assert launcher.stdout.read() == b""  # until the child has ended, too
    assert file.read_text().startswith("1 of ")
