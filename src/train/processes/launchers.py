"""The rank of this process and the number of all, from the launcher's environment variables.

``torchrun``, ``accelerate launch``, ``deepspeed`` and ``fusewright train --nproc`` set the
variables of PyTorch's ``env://`` rendezvous. SLURM's ``srun`` and Open MPI's ``mpirun`` have other
names, which are translated.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

from ...errors import FusewrightError, RecipeError

Environment = MutableMapping[str, str]

_NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}  # fmt: skip
"""Variables with the number of the process, of all processes, and the same on this machine; under
SLURM, mpirun starts its helpers by srun, so those of srun come last."""

_TIMEOUT_S = 10.0
"""Seconds after which a process reports what is wrong itself, because nobody has stopped it."""

_PORTS = range(15_000, 35_000)


@dataclass(frozen=True)
class Placement:
    """The position of a process in its run; ``rank`` and ``local_rank`` count from 0."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def placement(environ: Environment) -> Placement:
    """Read the placement of this process.

    ``environ`` is changed where a launcher has other names than PyTorch's ``env://``.

    Raises:
        RecipeError: the launcher's variables contradict each other, or are no numbers.
    """
    for launcher, names in _NAMES.items():
        if names[0] in environ and _number(environ, names[1], 1) > 1:
            return _read(environ, launcher, names)
        if launcher == "torchrun" and names[0] in environ and names[1] in environ:
            break  # one process alone, even where srun has started several of them
    return Placement()


def device_index(placed: Placement, gpus: int) -> int:
    """Which of the ``gpus`` that a process sees it uses; a launcher may show each only its own.

    Raises:
        RecipeError: there are fewer than processes on this machine.
    """
    if gpus == 1:
        return 0
    if placed.local_rank >= gpus:
        raise RecipeError(
            f"{placed.local_size} processes run on this machine, which has {gpus} GPUs: start one "
            "process per GPU"
        )
    return placed.local_rank


@contextlib.contextmanager
def reported_once(environ: Environment) -> Iterator[None]:
    """Let one process of a machine report what all of them find wrong before they are connected.

    The others give it time: a launcher stops them once one has ended.
    """
    placed = placement(environ)
    try:
        yield
    except FusewrightError:
        if placed.local_rank:
            time.sleep(_TIMEOUT_S)
        raise


def _read(environ: Environment, launcher: str, names: tuple[str, ...]) -> Placement:
    rank, size = _number(environ, names[0]), _number(environ, names[1])
    local_rank = _number(environ, names[2], rank)
    if launcher == "srun":
        local_size = min(_tasks_here(environ, size), size)
    else:
        local_size = _number(environ, names[3], 0) or _local_size(environ, launcher, size)
    if not (0 <= rank < size and 0 <= local_rank < max(local_size, 1)):
        raise RecipeError(
            f"{names[0]}={rank} and {names[1]}={size} ({names[2]}={local_rank}, "
            f"{names[3]}={local_size}) do not describe a process; unset them, or start the run "
            "with torchrun"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(rank), str(size)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(local_size)
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_host(environ, launcher, size == local_size)
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(_PORTS[_job(environ, launcher) % len(_PORTS)])
    return Placement(rank, size, local_rank, local_size)


def _number(environ: Environment, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    # SLURM writes 4(x2) for two machines with four tasks each
    match = re.fullmatch(r"\s*(\d+)(\(x\d+\))?\s*", text or "")
    if match is None:
        raise RecipeError(
            f"the environment says {name}={text or ''}, which is not a number; start the run with "
            "torchrun, or unset the variables of the launcher"
        )
    return int(match[1])


def _job(environ: Environment, launcher: str) -> int:
    """A number that differs between the runs of a machine, and that all processes of one know."""
    if launcher == "srun":
        return _number(environ, "SLURM_JOB_ID", 0) + 1000 * _number(environ, "SLURM_STEP_ID", 0)
    return zlib.crc32(name.encode()) if (name := environ.get("PMIX_NAMESPACE")) else 0


def _local_size(environ: Environment, launcher: str, size: int) -> int:
    """Processes on this machine; DeepSpeed has another name for it."""
    if launcher == "torchrun" and "LOCAL_SIZE" in environ:
        return _number(environ, "LOCAL_SIZE")
    return -(-size // _number(environ, "SLURM_STEP_NUM_NODES", 1))


def _tasks_here(environ: Environment, size: int) -> int:
    """The tasks of a SLURM step on this machine."""
    # ``SLURM_NTASKS_PER_NODE`` is the job's, and need not be true of its step
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    if node < len(counts):
        return counts[node]
    if "SLURM_STEP_NUM_NODES" in environ:
        return -(-size // _number(environ, "SLURM_STEP_NUM_NODES"))
    return _number(environ, "SLURM_NTASKS_PER_NODE", size)


def _first_host(environ: Environment, launcher: str, one_machine: bool) -> str:
    if one_machine:
        return "127.0.0.1"
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if hosts and shutil.which("scontrol"):
        names = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=False
        ).stdout.split()
        if names:
            return names[0]
    if hosts:
        return first_host(hosts)
    raise RecipeError(
        f"{launcher} has started processes on several machines without saying where rank 0 is; "
        "set MASTER_ADDR to the name of its machine"
    )


def first_host(hosts: str) -> str:
    """The first name of a SLURM list of machines, such as ``gpu[003-004,7],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else hosts
