"""Who has started this process, and as which of how many: read from the environment.

``torchrun``, ``accelerate launch``, ``deepspeed`` and ``fusewright train --nproc`` set the
variables of PyTorch's ``env://`` rendezvous. SLURM's ``srun`` and Open MPI's ``mpirun`` have names
of their own, which are translated.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass

from ...errors import RecipeError

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

_PORTS = range(15_000, 35_000)


@dataclass(frozen=True)
class Placement:
    """Where a process stands among those of its run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def placement(environ: Environment) -> Placement:
    """Read the placement of this process; the variables of ``env://`` are set if need be.

    Args:
        environ: the environment; changed where a launcher has other names than PyTorch.

    Raises:
        RecipeError: the launcher's variables contradict each other, or are no numbers.
    """
    for launcher, names in _NAMES.items():
        if names[0] in environ and _number(environ, names[1], 1) > 1:
            return _read(environ, launcher, names)
        if launcher == "torchrun" and names[0] in environ and names[1] in environ:
            break  # one process alone, even where srun has started several of them
    return Placement()


def _read(environ: Environment, launcher: str, names: tuple[str, ...]) -> Placement:
    rank, size = _number(environ, names[0]), _number(environ, names[1])
    local_rank = _number(environ, names[2], rank)
    local_size = _number(environ, names[3], 0) or _local_size(environ, size)
    if launcher == "srun":  # which may be that of a job whose steps have fewer tasks
        local_size = min(local_size, size)
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
        job = _number(environ, "SLURM_JOB_ID", 0)
        environ["MASTER_PORT"] = str(_PORTS[job % len(_PORTS)])
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


def _local_size(environ: Environment, size: int) -> int:
    """Processes on this machine, where the launcher does not say; SLURM counts the machines."""
    return -(-size // _number(environ, "SLURM_STEP_NUM_NODES", 1))


def _first_host(environ: Environment, launcher: str, one_machine: bool) -> str:
    """The machine of rank 0."""
    if one_machine:
        return "127.0.0.1"
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if hosts and shutil.which("scontrol"):
        found = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=False
        ).stdout.split()
        if found:
            return found[0]
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
