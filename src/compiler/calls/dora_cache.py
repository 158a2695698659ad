"""PEFT's DoRA layers clear a cache in each forward, and that is a write even if it is empty."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_MARK = "_fusewright_clears_what_is_there"


def clear_only_full_caches(module: nn.Module) -> None:
    """Let the DoRA layers in ``module`` leave their cache alone where it is empty.

    In training it always is. TorchDynamo takes the clearing of an empty dictionary for a side
    effect, and captures none inside a checkpoint (torch 2.13, peft 0.21, 2026-11-28). It looks the
    method up in the class, which is changed once, for good, and does the same as before.
    """
    for layer in module.modules():
        if not isinstance(vars(layer).get("_dora_cache"), dict):
            continue
        owner: Any = next((c for c in type(layer).__mro__ if "_cache_clear" in vars(c)), None)
        if owner is not None and not hasattr(vars(owner)["_cache_clear"], _MARK):
            owner._cache_clear = _if_full(vars(owner)["_cache_clear"])


def _if_full(clear: Any) -> Any:
    """The method ``clear``, called only where there is something to clear."""

    @functools.wraps(clear)
    def clear_full(self: Any) -> None:
        if self._dora_cache:
            clear(self)

    setattr(clear_full, _MARK, True)
    return clear_full
