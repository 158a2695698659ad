"""Which process this is, as each launcher says it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fusewright.errors import RecipeError
from fusewright.train.processes.launchers import Placement, first_host, placement


def _torchrun(**changes: str) -> dict[str, str]:
    return {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", **changes,
    }  # fmt: skip


def _srun(**changes: str) -> dict[str, str]:
    """Two machines with four tasks each."""
    return {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "123456", **changes,
    }  # fmt: skip


def _mpirun(**changes: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **changes,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def without_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def _without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


# --- torchrun ------------------------------------------------------------------------------------


def test_nobody_has_started_it() -> None:
    for environ in ({}, {"MASTER_ADDR": "10.0.0.1", "LOCAL_RANK": "3"}, {"SLURM_JOB_ID": "1"}):
        before = dict(environ)
        assert placement(environ) == Placement(0, 1, 0, 1)
        assert environ == before


def test_torchrun() -> None:
    environ = _torchrun()
    assert placement(environ) == Placement(rank=5, size=8, local_rank=1, local_size=4)
    assert environ == _torchrun()


def test_only_what_the_rendezvous_needs() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert placement(environ) == Placement(1, 2, 1, 2)
    assert (environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("a", "1")


def test_torchrun_of_one_process() -> None:
    one = _torchrun(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert placement(dict(one)) == Placement()
    # srun has started several of these, each for a run of its own
    assert placement({**_srun(), **one}) == Placement()


def test_torchrun_within_srun() -> None:
    assert placement({**_srun(SLURM_STEP_NUM_TASKS="2"), **_torchrun()}) == Placement(5, 8, 1, 4)


# --- SLURM ---------------------------------------------------------------------------------------


def test_srun_on_two_machines() -> None:
    environ = _srun()
    assert placement(environ) == Placement(rank=5, size=8, local_rank=1, local_size=4)
    added = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003", "MASTER_PORT": str(15_000 + 123_456 % 20_000),
    }  # fmt: skip
    assert environ == {**_srun(), **added}
    assert placement(environ) == Placement(5, 8, 1, 4)  # again, now by those


def test_all_ranks_of_srun_meet_at_one_place() -> None:
    met = set()
    for rank in range(8):
        environ = _srun(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % 4))
        assert placement(environ) == Placement(rank, 8, rank % 4, 4)
        met.add((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
    assert len(met) == 1


@pytest.mark.parametrize("per_node", ["4(x2)", " 4 ", None])
def test_tasks_per_machine(per_node: str | None) -> None:
    environ = _without(_srun(), "SLURM_NTASKS_PER_NODE")
    if per_node is not None:
        environ["SLURM_NTASKS_PER_NODE"] = per_node
    assert placement(environ) == Placement(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("step", "node", "local"),
    [("4(x2)", "1", 4), ("6,2", "0", 6), ("6,2", "1", 2), ("2(x2),4", "2", 4), ("", "1", 4)],
)
def test_a_step_on_several_machines_of_a_job_with_more_tasks_on_each(
    step: str, node: str, local: int
) -> None:
    """``srun`` passes on what ``sbatch --ntasks-per-node=8`` has said of the job."""
    environ = _srun(
        SLURM_NTASKS_PER_NODE="8", SLURM_STEP_TASKS_PER_NODE=step, SLURM_NODEID=node
    )  # fmt: skip
    assert placement(environ) == Placement(5, 8, 1, local)
    assert environ["MASTER_ADDR"] == "gpu003"


def test_a_step_that_is_smaller_than_its_job() -> None:
    environ = _srun(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1")
    assert placement(environ) == Placement(1, 2, 1, 2)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_one_machine_needs_no_name() -> None:
    changes = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "1"}
    environ = _without(_srun(**changes), "SLURM_STEP_NODELIST")
    assert placement(environ) == Placement(1, 4, 1, 4)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_what_the_user_has_set_stays() -> None:
    environ = _srun(MASTER_ADDR="head", MASTER_PORT="7")
    placement(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("head", "7")


def test_the_list_of_the_job_where_the_step_has_none() -> None:
    environ = _without(_srun(SLURM_JOB_NODELIST="a7,a9"), "SLURM_STEP_NODELIST")
    placement(environ)
    assert environ["MASTER_ADDR"] == "a7"


def test_a_batch_script_is_one_process() -> None:
    """``sbatch`` runs its script as a step of one task."""
    assert placement(_srun(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1")) == Placement()


def _scontrol(folder: Path, script: str) -> None:
    path = folder / "scontrol"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_scontrol_knows_better(without_scontrol: Path) -> None:
    script = 'test "$1 $2 $3" = "show hostnames gpu[003-004]" && echo head1 && echo head2'
    _scontrol(without_scontrol, script)
    environ = _srun()
    placement(environ)
    assert environ["MASTER_ADDR"] == "head1"


def test_scontrol_that_fails(without_scontrol: Path) -> None:
    _scontrol(without_scontrol, "echo no controller >&2; exit 1")
    environ = _srun()
    placement(environ)
    assert environ["MASTER_ADDR"] == "gpu003"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-004,7],login", "gpu003"),
        ("gpu[7,003-004]", "gpu7"),
        ("login,gpu[003-004]", "login"),
        ("node-[1-3]-ib,other", "node-1-ib"),
        ("rack[1-2]node[3,5-6],x", "rack1node3"),
        ("gpu-a.cluster.example", "gpu-a.cluster.example"),
        ("", ""),
    ],
)
def test_the_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


# --- Open MPI ------------------------------------------------------------------------------------


def test_mpirun() -> None:
    environ = _mpirun()
    assert placement(environ) == Placement(1, 2, 1, 2)
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("1", "2")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "15000")


def test_mpirun_within_slurm_starts_its_helpers_by_srun() -> None:
    helpers = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    environ = {**_srun(**helpers), **_mpirun(OMPI_COMM_WORLD_SIZE="6")}
    assert placement(environ) == Placement(1, 6, 1, 2)
    assert environ["MASTER_ADDR"] == "gpu003"


def test_mpirun_on_several_machines_does_not_say_where() -> None:
    environ = _mpirun(OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(RecipeError) as error:
        placement(environ)
    said = str(error.value)
    assert said.startswith("mpirun has started processes on several machines")
    assert "set MASTER_ADDR" in said
    environ["MASTER_ADDR"] = "head"
    assert placement(environ) == Placement(1, 4, 1, 2)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        (_torchrun(RANK="8"), ["RANK=8", "WORLD_SIZE=8"]),
        (_torchrun(LOCAL_RANK="4"), ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
        (_without(_torchrun(LOCAL_WORLD_SIZE="2"), "LOCAL_RANK"), ["LOCAL_RANK=5"]),
        (_srun(SLURM_PROCID="9"), ["SLURM_PROCID=9", "SLURM_STEP_NUM_TASKS=8"]),
        (_srun(SLURM_LOCALID="4"), ["SLURM_LOCALID=4", "SLURM_NTASKS_PER_NODE=4"]),
        (_mpirun(OMPI_COMM_WORLD_RANK="2"), ["OMPI_COMM_WORLD_RANK=2", "OMPI_COMM_WORLD_SIZE=2"]),
    ],
)
def test_values_that_contradict_each_other(environ: dict[str, str], names: list[str]) -> None:
    before = dict(environ)
    with pytest.raises(RecipeError, match="do not describe a process; unset them") as error:
        placement(environ)
    assert [name for name in names if name not in str(error.value)] == []
    assert environ == before


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (_torchrun(WORLD_SIZE="many"), "WORLD_SIZE=many"),
        (_torchrun(WORLD_SIZE=""), "WORLD_SIZE="),
        (_torchrun(RANK="-1"), "RANK=-1"),
        (_torchrun(LOCAL_RANK="0.5"), "LOCAL_RANK=0.5"),
        (_srun(SLURM_STEP_NUM_NODES="2-4"), "SLURM_STEP_NUM_NODES=2-4"),
    ],
)
def test_values_that_are_no_numbers(environ: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        placement(environ)
    assert str(error.value).startswith(f"the environment says {said}, which is not a number;")
