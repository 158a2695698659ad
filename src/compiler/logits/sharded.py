"""Weights that an engine has taken apart again, for whoever reads logits late.

Logits are computed when somebody reads them, which may be after the head's parameters were released
on this process. They are gathered once more then, as eager mode did before; so every process must
read. Where one does not, the others raise an error instead of waiting for it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from ...sharding import gathering_of, is_released

_ELSE = "Read them earlier, or use fusewright.optimize(model, logits='always')."


_calls: weakref.WeakKeyDictionary[nn.Module, tuple[int, count[int]]] = weakref.WeakKeyDictionary()
_models = count()


def call_name(model: nn.Module | None) -> str:
    """A name for the call at hand of a model's head, the same on every process."""
    if model is None:
        return ""
    if model not in _calls:
        _calls[model] = next(_models), count()
    number, calls = _calls[model]
    return f"{number}-{next(calls)}"


@contextmanager
def gathered(model: nn.Module | None, values: Iterable[Any], call: str) -> Iterator[None]:
    """While ``values`` are computed with, the parameters of ``model`` among them are whole.

    RuntimeError: one is not whole, and cannot be gathered; or not all processes read.
    """
    released = [v for v in values if isinstance(v, Tensor) and is_released(v)]
    engines = [e for v in released if (e := gathering_of(model, v)) is not None]
    if len(engines) < len(released):
        raise RuntimeError(
            "these logits were not read before the parameters that make them were released again "
            f"by what shards them. {_ELSE}"
        )
    with ExitStack() as stack:
        if engines and not all_meet(call, engines[0].group):
            raise RuntimeError(
                "these logits are read after the parameters that make them were released by what "
                "shards them, and not by every process; but all must take part in gathering them "
                f"again. Read them on every process. {_ELSE}"
            )
        for engine in engines:
            engine.gather()
            stack.callback(engine.release)
        yield


# --------------------------------------------------------------------- waiting for other processes
#
# A collective waits for every process, until its time-out of many minutes. Here a process that is
# alone learns so after a while, and the others, should they come later, that it has left.


_PATIENCE = 60.0
"""Seconds between the first process and the last one, at most."""
_POLL = 0.05
_ALL, _LEFT = "all", "left"


def all_meet(place: str, group: Any) -> bool:
    """Whether every process of a group comes here within a minute of the first one.

    ``place`` is a name, the same on every process and another one each time; so is the result.
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
