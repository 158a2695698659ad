"""A model is audited as it is, and is afterwards as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back gradients, buffers, modes and the state of all random numbers at the end."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]
    held = [(m, dict(m._buffers)) for m in model.modules()]
    modes = [(m, m.training) for m in model.modules()]
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        for module, mode in modes:
            module.training = mode
        for module, values in held:
            module._buffers.update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every probability of dropout to zero: modules', and modules' attributes."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, _DROPOUTS))
            if is_rate and isinstance(value, float) and value > 0:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


_DROPOUTS = (nn.modules.dropout._DropoutNd,)
