"""Logits of training calls that still wait for their loss, of all models.

A model that is called in evaluation mode meanwhile, without labels, is a teacher or a reference:
its logits are for the same loss, and can be lazy, too.
"""

from __future__ import annotations

import weakref

from .deferred import Deferred
from .reads import Reads

_pending: weakref.WeakKeyDictionary[Deferred, weakref.ref[Reads]] = weakref.WeakKeyDictionary()


def await_loss(logits: Deferred, reads: Reads) -> None:
    """Note that a training call returned ``logits`` without a loss; earlier ones no longer wait."""
    stop_waiting(reads)
    _pending[logits] = weakref.ref(reads)


def stop_waiting(reads: Reads) -> None:
    """Note that a model's backward pass has begun."""
    for logits, of in list(_pending.items()):
        if of() is reads or of() is None:
            del _pending[logits]


def another_awaits(reads: Reads) -> bool:
    """Whether a model other than that of ``reads`` has logits that wait for their loss."""
    return any(
        logits.is_pending and of() is not None and of() is not reads
        for logits, of in list(_pending.items())
    )
