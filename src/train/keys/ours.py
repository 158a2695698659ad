"""The keys that no other engine has."""

from __future__ import annotations

from typing import Literal

from .base import Int, Keys, key


class OurKeys(Keys):
    """Fusewright's own."""

    optimize: bool = True
    """Rewrite the model's formulas (``fusewright.optimize``); false: train it as it is."""

    codegen: Literal["auto", "eager", "inductor"] = "auto"
    """What runs the operations that no rewrite claims."""

    memory: str = "auto"
    """What blocks keep for backward: ``auto`` as much as the device has memory for, ``speed``
    everything, ``min`` only their inputs, or the whole budget of the process, such as ``8GB``."""

    strict: bool = False
    """Stop when a rewrite is refused or a known formula is missed. Unknown keys are always
    errors."""

    sample_prompt: str | None = None
    """A question that is answered before and after training. Unset: none."""

    sample_max_tokens: Int = key(64, gt=0)
    """Longest answer to ``sample_prompt``, in tokens."""
