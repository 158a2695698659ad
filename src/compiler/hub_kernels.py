"""Kernels of the Hub, which transformers puts into a model by itself (since 5.25, on a GPU).

They come in the place of norms and rotary embeddings, which no pattern would find then, and are put
in again whenever the model is set to training or evaluation. An optimized model runs without them;
those that a caller has chosen (``kernel_config``) stay.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..graph.opaque.hub_kernels import replaceable


@dataclass(frozen=True)
class _Had:
    """What a model had: kernels for what mode, if it had any, and whether it was in training."""

    mode: Any
    kernels: bool
    training: bool


_without: weakref.WeakKeyDictionary[nn.Module, _Had] = weakref.WeakKeyDictionary()
"""Models whose kernels were switched off."""


def switch_off(model: nn.Module) -> None:
    """Let the models in ``model`` run without the kernels that transformers has put in."""
    for part in model.modules():
        if not getattr(part, "_use_kernels", False) or not hasattr(part, "reset_kernels"):
            continue
        if getattr(part, "kernel_config", None) is None:
            held: Any = part
            had = _without[part] = _Had(held.kernels_mode, _has_kernels(part), part.training)
            if had.kernels:
                held.reset_kernels()
            held._use_kernels, held._kernels_mode = False, None


def switch_on(model: nn.Module) -> None:
    """Undo ``switch_off``."""
    for part in model.modules():
        had = _without.pop(part, None)
        if had is None:
            continue
        held, mode = cast(Any, part), had.mode
        if mode is not None and part.training != had.training:
            mode = type(mode).TRAINING if part.training else type(mode).INFERENCE
        if had.kernels:
            held.set_use_kernels(True, mode=mode)
        held._use_kernels, held._kernels_mode = True, mode


def _has_kernels(model: nn.Module) -> bool:
    held = (h for m in model.modules() for h in (m, *replaceable(m)))
    return any("_kernel_repo" in h.__dict__ for h in held)
