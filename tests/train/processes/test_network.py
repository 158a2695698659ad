"""Where gloo listens, so that other machines reach it."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed import HashStore

from fusewright.train.processes import world
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.world import address_to, choose_interface

FIRST, SECOND = Placement(0, 2, 0, 1), Placement(1, 2, 0, 1)
ROUTES = {"first": None, "10.0.0.2": "10.0.0.1"}
"""The addresses that the machine of rank 0 has on its way to others: its own is a loopback one."""


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(address="10.0.0.1")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "cable": [entry]})


def _chosen(placed: Placement, store: HashStore, **environ: str) -> dict[str, str]:
    own = {"MASTER_ADDR": "first", **environ}
    choose_interface(own, placed, store)
    return own


def test_a_loopback_address_is_none_that_others_reach() -> None:
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        assert address_to(host) is None
    assert address_to("there.is.no.such.host.invalid") is None


def test_the_own_address_on_the_way_to_rank_0(cable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "address_to", {"first": "10.0.0.1"}.get)
    store = HashStore()
    assert _chosen(SECOND, store)["GLOO_SOCKET_IFNAME"] == "cable"
    assert store.get("address-1") == b"10.0.0.1"


def test_rank_0_asks_the_others_where_it_finds_itself_at_a_loopback_address(
    cable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "address_to", ROUTES.get)
    store = HashStore()
    store.set("address-1", "10.0.0.2")
    assert _chosen(FIRST, store)["GLOO_SOCKET_IFNAME"] == "cable"


def test_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two agents on one machine."""
    monkeypatch.setattr(world, "address_to", lambda host: None)
    store = HashStore()
    store.set("address-1", "")
    assert "GLOO_SOCKET_IFNAME" not in _chosen(FIRST, store)


def test_what_the_user_has_set_stays_and_the_others_need_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "address_to", ROUTES.get)
    store = HashStore()
    assert _chosen(FIRST, store, GLOO_SOCKET_IFNAME="ib0")["GLOO_SOCKET_IFNAME"] == "ib0"
    assert store.get("address-0") == b""


def test_one_machine_has_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert "GLOO_SOCKET_IFNAME" not in _chosen(Placement(0, 2, 0, 2), HashStore())
