"""The network between the machines of a run, where a launcher does not say which it is."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import psutil

from .launchers import Environment, Placement

_VARIABLE = "GLOO_SOCKET_IFNAME"

HINT = (
    f"set {_VARIABLE} (and NCCL_SOCKET_IFNAME) on each machine to its network interface that the "
    "others reach, which `ip addr` lists"
)
"""What to do where processes find the store of rank 0, but not each other."""


def choose_interface(environ: Environment, placed: Placement, store: Any) -> None:
    """Let gloo listen where the other machines reach this one.

    By itself it takes the address of this machine's name. On many systems that is a loopback
    address, which the others cannot reach. NCCL never takes such an address. The machine that the
    rendezvous is at may find itself at such an address, too: there traffic to the others decides.

    Args:
        environ: the environment; changed unless the variable is set.
        placed: this process. With one machine, nothing is changed.
        store: the rendezvous' store, where each process finds the addresses of the others.
    """
    if placed.size == placed.local_size:
        return
    own = address_to(environ["MASTER_ADDR"])
    store.set(f"address-{placed.rank}", own or "")
    if _VARIABLE in environ:
        return
    for rank in range(placed.size):
        if own is not None:
            break
        other = str(store.get(f"address-{rank}"), "utf-8")
        own = address_to(other) if other else None
    name = None if own is None else _interface(own)
    if name is not None:
        environ[_VARIABLE] = name


def address_to(host: str) -> str | None:
    """The address of this machine that traffic to another one has.

    Args:
        host: its name or address; of this machine: the result is the same address.

    Returns:
        None: it is a loopback address, or it cannot be known.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram: sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(own).is_loopback else own


def _interface(own: str) -> str | None:
    """The network interface that has an address of this machine."""
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own.partition("%")[0] for entry in found):
            return name
    return None
