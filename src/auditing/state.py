"""A model is audited as it is, and is afterwards as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator

import torch
from torch import nn

from ..compiler.pipeline import reads_of
from .drift import kind_of


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back gradients, buffers, modes and the state of all random numbers at the end.

    What ``explain`` says of reads of the logits is put back, too.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]
    held = [(m, dict(m._buffers)) for m in model.modules()]
    modes = [(m, m.training) for m in model.modules()]
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    reads = reads_of(model)
    uncounted = contextlib.nullcontext() if reads is None else reads.uncounted()
    try:
        with torch.random.fork_rng(devices=devices), uncounted:
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


def rates_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """The probabilities of dropout above zero: kind, module, attribute and value."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not isinstance(value, float) or not 0 < value < 1:
                continue
            if isinstance(module, _DROPOUTS) and name == "p":
                yield kind_of(path), module, name, value
            elif "dropout" in name and not isinstance(module, _DROPOUTS):
                yield kind_of(f"{path}.{name}"), module, name, value


_DROPOUTS = (nn.modules.dropout._DropoutNd,)


@contextlib.contextmanager
def only_dropout(model: nn.Module, kinds: Collection[str] = ()) -> Iterator[None]:
    """Set all probabilities of dropout to zero, but those of some kinds."""
    changed = []
    for each, module, name, value in list(rates_of(model)):
        if each not in kinds:
            changed.append((module, name, value))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
