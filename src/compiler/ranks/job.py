"""The job that this process is a rank of, wherever its process group was made."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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
