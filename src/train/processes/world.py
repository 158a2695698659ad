"""The processes of a run, and their communication.

What rank 0 does alone (preparing rows, writing files), the others wait for at a store (rank 0's, or
across machines that of the rendezvous), however long it takes: a collective would time out. What
all of them do together is a collective on small CPU tensors (gloo), so that no GPU is synchronized.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ...errors import FusewrightError, ProcessLostError, RecipeError, first_line
from .launchers import Environment, Placement, device_index, placement

T = TypeVar("T")

PARENT = "FUSEWRIGHT_PARENT"
"""The variable with the process id of ``--nproc``'s parent."""

_POLL = 0.5
"""Most seconds between two polls of the store."""
_TIMEOUT_S = 3.0
"""Seconds that a failing process waits for the message of another one."""

_LOST = re.compile(
    r"connection (closed|reset|refused|was reset)|broken pipe|socket (closed|timeout)|"
    r"timed out waiting|no route to host|remote process exited|nccl (remote|communicator)|"
    r"distnetworkerror|failed to recv|unhandled system error|application timeout caused pair",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say when another process is gone."""


class World:
    """The processes of a run. With one process, every method returns at once.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many there are on its machine.
        group: how many processes train the same batch; set by ``share_batches``.
        unread: the message about settings of the launcher that are not read, or None.

    ``store`` is where the others wait for rank 0; None: there is one process. ``failures`` is where
    they find why another one has ended; None: there, too.
    """

    def __init__(
        self, placed: Placement | None = None, store: Any = None, failures: Any = None
    ) -> None:
        placed = placed or Placement()
        self.rank, self.size = placed.rank, placed.size
        self.local_rank, self.local_size = placed.local_rank, placed.local_size
        self.group = 1
        self.unread: str | None = None
        self._store, self._failures = store, failures or store
        self._shared = 0

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def share_batches(self, group: int) -> None:
        """Set how many processes of consecutive ranks train the same batch."""
        self.group = group

    @property
    def batch_rank(self) -> int:
        """The number of this process's group, from 0."""
        return self.rank // self.group

    @property
    def batch_ranks(self) -> int:
        """How many groups there are."""
        return self.size // self.group

    def share(self, make: Callable[[], T]) -> T:
        """Let rank 0 make a value, which must survive JSON; the others wait, with no time-out.

        Raises:
            SystemExit: on the other ranks, where ``make`` fails; rank 0 says why.
            ProcessLostError: rank 0 is gone.
        """
        if not self.several:
            return make()
        self._shared += 1
        name = f"shared-{self._shared}"
        text = [json.dumps(make()) if self.main else ""]
        try:
            if self.main:
                self._store.set(name, text[0])
                self._store.check([name])  # set() does not notice a store that has just gone
            else:
                text = [self._awaited(name)]
        except dist.DistNetworkError:  # a launcher on another machine was killed: save without it
            dist.broadcast_object_list(text)
        return json.loads(text[0])  # type: ignore[no-any-return]  # 2026-11-27: what ``make`` gave

    def wait_for_main(self) -> None:
        """Wait until rank 0 is here, too."""
        self.share(lambda: None)

    def one_per_machine(self, work: Callable[[], Any]) -> None:
        """Let the first process of each machine do ``work``, then its others; no time-out.

        Rank 0, which has done it, does not take part. Machines may get ranks one by one.
        """
        place, done = f"place-{self._shared}", f"done-{self._shared}"
        host = socket.gethostname()
        self._store.set(f"{place}-{self.rank}", f"{self.local_rank} {host}")
        for rank in range(1, self.size) if self.local_rank else ():
            if self._awaited(f"{place}-{rank}") == f"0 {host}":
                self._awaited(f"{done}-{rank}")
        work()
        if not self.local_rank:
            self._store.set(f"{done}-{self.rank}", "")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; a collective."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over the batches of all processes; a collective."""
        if not self.several:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.group).tolist()

    def most(self, value: int) -> int:
        """The largest of a number over all processes; a collective."""
        if not self.several:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    # --- failures --------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends with ``error``.

        Raises:
            SystemExit: rank 0 ends with the same words, or another process has ended first and
                said why; one message is enough.
        """
        if not self.several or isinstance(error, SystemExit):
            return
        text = str(error)
        with contextlib.suppress(Exception):  # the store may be gone, too
            if not isinstance(error, ProcessLostError):
                self._failures.set(f"failed-{self.rank}", json.dumps(text))
                with contextlib.suppress(Exception):  # rank 0, whose it is, may be gone
                    self._store.set(f"failed-{self.rank}", json.dumps(text))
            if self.main and not _launcher_has_store():
                time.sleep(2 * _POLL)  # until the others have read that
            if self.main or not isinstance(error, FusewrightError | KeyboardInterrupt):
                return
            message = self._failure_of(0)
            if message is not None and (message == text or isinstance(error, ProcessLostError)):
                time.sleep(_TIMEOUT_S)  # a launcher stops the others once one has ended
                number = getattr(error, "signal", None)  # of a KeyboardInterrupt
                raise SystemExit(2 if number is None else 128 + number)

    def _failure_of(self, rank: int) -> str | None:
        """The message of a process that has failed, if it comes soon."""
        end = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < end:
            if self._failures.check([f"failed-{rank}"]):
                return str(json.loads(self._failures.get(f"failed-{rank}")))
            time.sleep(0.1)
        return None

    def _awaited(self, name: str) -> str:
        pause = 0.001
        while not self._store.check([name]):  # its own wait() warns on standard error
            if self._store.check(["failed-0"]):
                time.sleep(_TIMEOUT_S)  # a launcher stops the others once one has ended
                raise SystemExit(2)
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        return str(self._store.get(name), "utf-8")


@contextlib.contextmanager
def joined(timeout: float | None) -> Iterator[World]:
    """Join the other processes of the run, if a launcher has started several, until the end.

    A group of processes that is there already is used, and stays.

    ``timeout`` is that of collectives, in seconds; None: PyTorch's default.

    Raises:
        RecipeError: the launcher's variables are not right.
        ProcessLostError: another process has ended during the run.
    """
    with ignored(os.environ) as unread, _group(timeout) as world:
        world.unread = unread
        yield world


@contextlib.contextmanager
def _group(timeout: float | None) -> Iterator[World]:
    if dist.is_available() and dist.is_initialized():
        with _entered(_world_there()) as world:
            yield world
        return
    placed = placement(os.environ)
    if placed.size == 1:
        yield World()
        return
    if PARENT in os.environ:
        end_with_parent()
    wait = datetime.timedelta(seconds=timeout) if timeout else dist.default_pg_timeout
    try:
        store, rank, size = next(rendezvous("env://", timeout=wait))
    except (OSError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if placed.rank == 0 and "EADDRINUSE" in str(error):
            raise RecipeError(
                f"MASTER_PORT: {address} is in use by another program: set another port (torchrun: "
                "--master-port)"
            ) from error
        raise ProcessLostError(
            f"rank {placed.rank} of {placed.size} cannot reach rank 0 at {address}: "
            f"{first_line(error)}"
        ) from error
    failures = _of_this_run(store)
    with _losses(machines=placed.local_size < placed.size):
        store = _store_of_rank_0(failures, placed, wait) if _launcher_has_store() else failures
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(device_index(placed, torch.cuda.device_count()))

    def connect() -> None:
        choose_interface(os.environ, placed, PrefixStore("network", store))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", store), rank=rank, world_size=size, timeout=wait,
        )  # fmt: skip

    try:
        stores = [PrefixStore("fusewright", kept) for kept in (store, failures)]
        with _entered(World(placed, *stores), connect) as world:
            yield world
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


@contextlib.contextmanager
def _entered(world: World, connect: Callable[[], None] | None = None) -> Iterator[World]:
    """Tell the other processes how this one ends, and end together."""
    try:
        with _losses(machines=world.size > world.local_size):
            if connect is not None:
                connect()
            yield world
            world.wait_for_main()
            world.most(0)  # rank 0 may own the store: it stays until the others have read it
    except BaseException as error:
        world.fail(error)
        raise


def _world_there() -> World:
    """The processes of a group that the caller, or what started this process, has made.

    It stays when the run ends. Ranks are the group's; where the environment does not say which of
    them are on this machine, as accelerate wants to know, their hosts do.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return World()
    backends = dist.get_backend_config()
    if "cpu:" not in backends:
        raise RecipeError(
            f"the process group that is there already ({backends}) has no backend for the CPU: "
            'make it with backend "cpu:gloo,cuda:nccl" (Ray Train: TorchTrainer(..., '
            'torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl")))'
        )
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, socket.gethostname())
    local = [other for other in range(size) if hosts[other] == hosts[rank]]
    numbers = {"RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.setdefault("LOCAL_RANK", str(local.index(rank)))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(len(local)))
    placed = Placement(
        rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    )
    store = _of_this_run(distributed_c10d._get_default_store())
    return World(placed, PrefixStore("fusewright", store))


_runs = itertools.count(1)


def _of_this_run(store: Any) -> Any:
    """A part of a rendezvous' store: another run may follow in the same processes."""
    return PrefixStore(f"run-{next(_runs)}", store)


@contextlib.contextmanager
def _losses(machines: bool = False) -> Iterator[None]:
    """Turn PyTorch's errors about a lost process into ProcessLostError."""
    try:
        yield
    except RuntimeError as error:  # an OSError is of a file, a pipe or a download
        if not lost(error):
            raise
        message = (
            "another process of this run has ended, so this one cannot continue either; what it "
            "said is above, or in its launcher's log. Start the run again with "
            "auto_resume_from_checkpoints: true to resume"
        )
        if machines and "connectFullMesh" in str(error):  # of gloo, before anything else
            message = (
                "another process of this run cannot be reached: it has ended (what it said is "
                f"above, or in its launcher's log), or gloo takes the wrong network: {HINT}"
            )
        raise ProcessLostError(f"{message} ({first_line(error)})") from error


def _launcher_has_store() -> bool:
    """Whether the rendezvous' store outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_rank_0(launcher: Any, placed: Placement, timeout: datetime.timedelta) -> Any:
    """A store that outlives a launcher that is killed: the processes save, and wait for rank 0.

    Across machines it stays the launcher's, whose address all of them are known to reach.
    """
    if placed.local_size < placed.size:
        return launcher
    tcp_store = functools.partial(dist.TCPStore, "127.0.0.1", timeout=timeout)  # type: ignore[attr-defined]  # 2026-12-01: not in its list
    if placed.rank == 0:
        store = tcp_store(0, is_master=True, wait_for_workers=False)
        launcher.set("port", str(store.port))
        return store
    return tcp_store(int(launcher.get("port")))


def lost(error: BaseException) -> bool:
    """Whether an error is PyTorch's way of reporting that another process is gone."""
    kinds = (dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or bool(_LOST.search(str(error)))


@functools.cache  # a second thread would be a second signal
def end_with_parent() -> None:
    """Get one SIGTERM, and so save, when the parent of this process is killed."""
    parent = int(os.environ[PARENT])
    if os.getppid() != parent:
        raise SystemExit(1)
    threading.Thread(target=_signal_after, args=(parent,), daemon=True).start()


def _signal_after(parent: int) -> None:
    """Send this process a SIGTERM once it has another parent.

    prctl(PR_SET_PDEATHSIG) would send one for each thread of the parent, and a second SIGTERM means
    to quit without saving.
    """
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGTERM)


# --- settings of ``accelerate launch``, which are not read: the recipe decides --------------------
#
# Its options and the files of ``accelerate config`` arrive as environment variables, which
# transformers and accelerate read in many places.


_BEGIN = (
    "ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_",
    "ACCELERATE_GRADIENT_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_FP8_", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_TORCH_DEVICE", "FSDP_", "FP8_",
    "MEGATRON_LM_", "PARALLELISM_CONFIG_",
)  # fmt: skip
"""Prefixes of those variables."""

_OPTIONS = {
    "ACCELERATE_USE_FSDP": "use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use_parallelism_config",
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
"""The options that a user may miss, by their variables."""

_NOTHING = ("", "no", "none", "false", "auto")
"""Values with which an option does nothing."""


@contextlib.contextmanager
def ignored(environ: Environment) -> Iterator[str | None]:
    """Take the settings of ``accelerate launch`` out of the environment, until the end.

    The environment is then as before, whatever libraries have set in it.

    Yields:
        The message about those that would have changed the run; None: there is none.
    """
    before = {name: environ.pop(name) for name in _settings(environ)}
    try:
        yield _message(before)
    finally:
        for name in _settings(environ):
            del environ[name]
        environ.update(before)


def _settings(environ: Environment) -> list[str]:
    return [name for name in environ if name.startswith(_BEGIN)]


def _message(settings: dict[str, str]) -> str | None:
    parts = []
    for name, option in _OPTIONS.items():
        value = settings.get(name, "").lower()
        if value not in _NOTHING:
            parts.append(option if value == "true" else f"{option} {value}")
    if settings.get("ACCELERATE_USE_CPU", "").lower() == "true" and torch.cuda.is_available():
        parts.append("cpu (CUDA_VISIBLE_DEVICES= hides the GPUs)")
    if not parts:
        return None
    return f"the recipe decides; not applied from accelerate launch: {', '.join(parts)}"


# --- the network between the machines, where a launcher does not say which it is ------------------


_VARIABLE = "GLOO_SOCKET_IFNAME"

HINT = (
    f"set {_VARIABLE} (and NCCL_SOCKET_IFNAME) on each machine to its network interface that the "
    "others reach, which `ip addr` lists"
)
"""The remedy where processes find the store of rank 0, but not each other."""


def choose_interface(environ: Environment, placed: Placement, store: Any) -> None:
    """Let gloo listen where the other machines reach this one.

    By itself it takes the address of this machine's name. On many systems that is a loopback
    address, which the others cannot reach. NCCL never takes such an address. The machine that the
    rendezvous is at may see itself at such an address, too: there traffic to the others decides.

    ``environ`` is changed unless the variable is set, or there is one machine. ``store`` is the
    rendezvous', where each process finds the addresses of the others.
    """
    if placed.size == placed.local_size:
        return
    address = address_to(environ["MASTER_ADDR"])
    store.set(f"address-{placed.rank}", address or "")
    if _VARIABLE in environ:
        return
    for rank in range(placed.size):
        if address is not None:
            break
        other = str(store.get(f"address-{rank}"), "utf-8")
        address = address_to(other) if other else None
    name = None if address is None else _interface(address)
    if name is not None:
        environ[_VARIABLE] = name


def address_to(host: str) -> str | None:
    """The address of this machine in traffic to ``host``, which may be this machine itself.

    None: it is a loopback address, or it cannot be known.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram: sends nothing
            source = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(source).is_loopback else source


def _interface(address: str) -> str | None:
    """The network interface that has an address of this machine."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in addresses):
            return name
    return None
