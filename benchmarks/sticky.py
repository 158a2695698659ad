"""Whether this process can still use its GPU: after an illegal access, no later call does."""

from __future__ import annotations

import sys


def broken_context() -> str:
    """Why nothing runs on the GPU any more in this process, or empty.

    Running out of memory and failed launches leave the context as it was; what a running kernel
    leaves behind is raised again by each synchronization.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""
