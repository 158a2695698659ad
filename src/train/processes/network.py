"""The network between the machines of a run, where a launcher does not say which it is."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from .launchers import Environment, Placement

_VARIABLE = "GLOO_SOCKET_IFNAME"

HINT = (
    f"set {_VARIABLE} (and NCCL_SOCKET_IFNAME) on each machine to its network interface that the "
    "others reach, which `ip addr` lists"
)
"""What to do where processes find the store of rank 0, but not each other."""


def choose_interface(environ: Environment, placed: Placement) -> None:
    """Let gloo listen where the other machines reach this one.

    By itself it takes the address of this machine's name. On many systems that is a loopback
    address, which the others cannot reach. NCCL never takes such an address.

    Args:
        environ: the environment; changed unless the variable is set.
        placed: this process. With one machine, nothing is changed.
    """
    if placed.size == placed.local_size or _VARIABLE in environ:
        return
    name = interface_to(environ["MASTER_ADDR"])
    if name is not None:
        environ[_VARIABLE] = name


def interface_to(host: str) -> str | None:
    """The network interface that traffic to a machine takes; to this one: which has its address.

    None: that is a loopback interface, or it cannot be known.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram: sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in found):
            return name
    return None
