"""Whether a call of a model by one rank alone would wait for the others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

_ENGINES = (
    "torch.distributed.",
    "torch.nn.parallel.distributed",
    "deepspeed.",
    "transformers.integrations.tensor_parallel",
)
_LOCAL = ("torch.distributed.algorithms._checkpoint.",)
"""Modules of these that only run the model; they send nothing."""


def collectives_of(model: nn.Module) -> str | None:
    """What would run a collective if ``model`` were called, in words; None if nothing is known to.

    With one process, nothing does. A model inside ``DistributedDataParallel`` is called without
    one; the wrapper is not.
    """
    if not has_peers():
        return None
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
                return "its parameters are sharded"
        for name in _origins(module):
            if name.startswith(_ENGINES) and not name.startswith(_LOCAL):
                where = f"{path} is" if path else "it is"
                return f"{where} wrapped by {'.'.join(name.split('.')[:3])}"
    return None


def _origins(module: nn.Module) -> Iterator[str]:
    """The Python modules that its classes and the hooks around its forward are from."""
    yield from (kind.__module__ for kind in type(module).__mro__)
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        function = inspect.unwrap(getattr(function, "__func__", function))
        yield str(getattr(function, "__module__", ""))


# --- the job that this process is a rank of, wherever its process group was made ------------------


def has_peers() -> bool:
    """Whether ``torch.distributed`` is initialized with several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def job_store() -> Any:
    """The key-value store of the process group, for verdicts; None with one rank."""
    if not has_peers():
        return None
    # imported here: a PyTorch that was built without it has no such module
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    try:
        return PrefixStore("fusewright-verdicts", _get_default_store())
    except Exception:  # a group without one, as MPI's
        return None
