"""Two machines in one: namespaces with a host name, a network and files of their own.

``unshare`` makes them, as root or in a user namespace, and nothing of them is left once the
processes in them have ended. A pair of virtual Ethernet devices is the cable between them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...load import stretched

NAMES = ("first", "second")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TOOLS = ("unshare", "nsenter", "ip", "mount", "sh")
_USERS: tuple[tuple[str, ...], ...] = ((), ("--user", "--map-root-user"))
"""As root, and as anybody, who is root in a namespace of users."""


class CannotBeMade(Exception):
    """Namespaces cannot be made here; the text says why."""


@dataclass
class Machine:
    """A machine, which is there as long as its ``process`` runs.

    Attributes:
        name: of the host.
        process: in its namespaces.
        user: whether it has a namespace of users.
    """

    name: str
    process: subprocess.Popen[str]
    user: bool

    def command(self, *command: str) -> list[str]:
        """What runs ``command`` on it."""
        users = ["--user", "--preserve-credentials"] if self.user else []
        kinds = ["--net", "--uts", "--mount", *users]
        return ["nsenter", "--target", str(self.process.pid), *kinds, *command]

    def run(self, *command: str) -> None:
        """Run a command that sets it up.

        Raises:
            CannotBeMade: it failed.
        """
        done = subprocess.run(
            self.command(*command),
            capture_output=True,
            text=True,
            timeout=stretched(30),
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise CannotBeMade(f"{' '.join(command)}: {said}")


@contextlib.contextmanager
def two_machines(
    folder: Path, hosts: Mapping[str, str], own: Mapping[str, Sequence[Path]]
) -> Iterator[list[Machine]]:
    """Make two machines of ``NAMES`` that reach each other at ``ADDRESSES``.

    Args:
        folder: for what only one of them has.
        hosts: their ``/etc/hosts``, by name.
        own: folders that a machine has for itself; all others are shared.

    Raises:
        CannotBeMade: this machine, or this user, may not.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise CannotBeMade(f"there is no {' and no '.join(missing)} here")
    with contextlib.ExitStack() as stack:
        machines = _start(stack)
        _connect(machines)
        for machine in machines:
            files = folder / machine.name
            files.mkdir()
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{hosts[machine.name]}\n")
            machine.run("mount", "--bind", str(files / "hosts"), "/etc/hosts")
            for shared in own.get(machine.name, ()):
                shared.mkdir(parents=True, exist_ok=True)
                (files / shared.name).mkdir()
                machine.run("mount", "--bind", str(files / shared.name), str(shared))
        yield machines


def _start(stack: contextlib.ExitStack) -> list[Machine]:
    """Both, without a network."""
    reasons = []
    for users in _USERS:
        if not users and os.geteuid() != 0:
            continue
        try:
            first = _hold(stack, NAMES[0], [], users)
            # both in one namespace of users, whose root may lay a cable between them
            inside = ["nsenter", "-t", str(first.process.pid), "--user", "--preserve-credentials"]
            return [first, _hold(stack, NAMES[1], inside if users else [], (), bool(users))]
        except CannotBeMade as error:
            reasons.append(str(error))
    raise CannotBeMade("; ".join(reasons))


def _hold(
    stack: contextlib.ExitStack,
    name: str,
    before: Sequence[str],
    users: Sequence[str],
    user: bool | None = None,
) -> Machine:
    command = [
        *before, "unshare", *users, "--net", "--uts", "--mount",
        "sh", "-c", 'echo "$1" > /proc/sys/kernel/hostname && echo there && exec cat', "sh", name,
    ]  # fmt: skip
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    stack.callback(_end, process)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "there\n":
        raise CannotBeMade(f"{' '.join(command[:-5])}: {process.stderr.read().strip()}")
    return Machine(name, process, bool(users) if user is None else user)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _connect(machines: Sequence[Machine]) -> None:
    first, second = machines
    peer = ["peer", "name", "cable", "netns", str(second.process.pid)]
    first.run("ip", "link", "add", "cable", "type", "veth", *peer)
    for machine, address in zip(machines, ADDRESSES, strict=True):
        machine.run("ip", "address", "add", f"{address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            machine.run("ip", "link", "set", device, "up")
