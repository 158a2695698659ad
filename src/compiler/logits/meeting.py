"""Whether all processes of a group have come to the same place, without waiting for ever.

A collective waits for every process, until its time-out of many minutes. Here a process that is
alone learns so after a while, and the others, should they come later, that it has left.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_PATIENCE = 60.0
"""Seconds between the first process and the last one, at most."""
_POLL = 0.05
_ALL, _LEFT = "all", "left"


def all_meet(place: str, group: Any) -> bool:
    """Whether every process of a group comes here within a minute of the first one.

    Args:
        place: a name, the same on every process and another one each time.
        group: a process group; None: that of all processes.

    Returns:
        The same on all of them.
    """
    if not dist.is_initialized() or dist.get_world_size(group) < 2:
        return True
    store: Any = c10d._get_default_store()
    if store is None:  # under MPI there is none
        return True
    ranks = dist.get_process_group_ranks(group)
    name = f"fusewright/{ranks[0]}/{place}"
    count, verdict = f"{name}/count", f"{name}/verdict"
    if store.add(count, 1) == len(ranks):
        store.compare_set(verdict, "", _ALL)
    end = time.monotonic() + _PATIENCE
    while not store.check([verdict]):
        if time.monotonic() > end:
            store.compare_set(verdict, "", _LEFT)
            break
        time.sleep(_POLL)
    return str(store.get(verdict), "utf-8") == _ALL
