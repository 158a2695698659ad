"""Logits whose weights change before somebody reads them.

Logits are computed when they are read, from rows and weights that belong to somebody else. So a
late read is **equal to what eager mode computed, or an error that says what to do, and never a
wrong value**; and a call without gradients raises no error where something can be done about it:

- What a call reads later are aliases of its operands. ``p.data = ...`` and ``model.to(...)`` give
  the parameter other memory, and leave the aliases what they were. Without gradients the rows are
  copies.
- ``fingerprint`` sees all bytes of them, however they were written to: each read compares it with
  the one of the call. Where they differ, it raises ``WeightsChanged``.
- Before changes that can be foreseen, ``KeptLogits`` computes what somebody still holds: that of
  calls without gradients, and what was detached. These are ``load_state_dict``, and a gradient of
  the weights (an optimizer's step comes next). Only logits without gradients whose losses or
  log-probabilities were made in tiles do not become a tensor for a gradient's sake: a reference's
  logits may still have a name while the policy is trained.

What remains is an error, in evaluation too: to write into the head's weights in place and unseen
(``p.data.copy_()``, an optimizer's step whose gradients were there before the call), and to read
whole logits then.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...sharding import in_zero3
from .deferred import Deferred


class WeightsChanged(RuntimeError):
    """The rows or weights of logits have changed since the call."""

    def __init__(self) -> None:
        super().__init__(
            "these logits were not read before the weights that make them were changed (by an "
            "optimizer, most likely). Read them earlier, or use "
            "fusewright.optimize(model, logits='always')."
        )


# ------------------------------------------------------------------------------------ fingerprints

_WORDS = 1 << 14
"""How many words have one sum."""
_CHUNK = {"cpu": 1 << 18}
"""How many words are multiplied at once, by the kind of device; elsewhere 2^22."""

Fingerprint = list[list[Tensor]]
"""Sums of the bytes of each value."""


def fingerprint(values: Iterable[Any]) -> Fingerprint:
    """Sums that tell later whether the tensors among ``values`` have other bytes.

    Each 32-bit word is multiplied with an odd number of 64 bits, its own among 16,384, and these
    are added up: one word that changes is always seen, and of several only those whose changes
    cancel out, by a chance of 2^-33 at most for each of the sums. It stays on the device, so that
    nobody waits. A head of 49,152 x 576 in bfloat16 takes 8 ms on two cores of an AMD EPYC, its
    product with 1,024 rows 174 (torch 2.13, 2026-11-29).
    """
    return [_sums(v) if isinstance(v, Tensor) else [] for v in values]


def is_unchanged(values: Iterable[Any], before: Fingerprint) -> bool:
    """Whether ``values`` are what ``fingerprint`` saw in ``before``; None is skipped."""
    pairs = zip(fingerprint(values), before, strict=True)
    return all(torch.equal(a, b) for now, then in pairs for a, b in zip(now, then, strict=False))


def _sums(t: Tensor) -> list[Tensor]:
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
        return [part for name in names for part in _sums(getattr(t, name))]
    if t.is_meta or isinstance(t, FakeTensor):
        return []
    with torch.no_grad():
        data = t.detach().reshape(-1).view(torch.uint8)
        if data.storage_offset() % 4:
            data = data.clone()
        end = data.numel() // 4 * 4
        words, rest = data[:end].view(torch.int32), data[end:]
        weights = _weights(t.device)
        whole = words.numel() // _WORDS * _WORDS
        rows = words[:whole].view(-1, _WORDS)
        count = _CHUNK.get(t.device.type, 1 << 22) // _WORDS
        # in one buffer: to touch fresh memory for each chunk takes ten times as long on a CPU
        products = weights.new_empty(min(count, len(rows)), _WORDS)
        sums = [
            torch.mul(chunk, weights, out=products[: len(chunk)]).sum(1)
            for chunk in rows.split(count)
            if len(chunk)
        ]
        last = words[whole:]
        tail = torch.stack([(part * weights[: part.numel()]).sum() for part in (last, rest)])
        return [torch.cat([*sums, tail])]


@functools.cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(1 << 62), 1 << 62, (_WORDS,), generator=generator)
    return (numbers * 2 + 1).to(device)


# ------------------------------------------------------------------------- versions, as autograd's

Remembered = tuple[Tensor, int | None]
"""A tensor that backward reads, and its version; None where it has none, as in inference mode."""


def remembered(t: Tensor) -> Remembered:
    """``t`` without its history, which shares memory and version with it."""
    return t.detach(), None if t.is_inference() else t._version


def unchanged(kept: Remembered) -> Tensor:
    """The tensor that was remembered; RuntimeError, as autograd's, if it was written to since."""
    t, version = kept
    if version is not None and t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{t.type()} {list(t.shape)}] is at version {t._version}; expected "
            f"version {version} instead. Write to a clone() of it, or call backward before."
        )
    return t


# ------------------------------------------------------------------------------ foreseeable changes


class KeptLogits:
    """Values of one model that somebody may want when the weights that make them have changed."""

    def __init__(self) -> None:
        self._pending: weakref.WeakKeyDictionary[Deferred, Callable[[], bool]] = (
            weakref.WeakKeyDictionary()
        )
        self._undo: list[Callable[[], None]] = []
        self._watched: dict[int, tuple[weakref.ref[nn.Module], str]] = {}

    @staticmethod
    def of(model: nn.Module) -> KeptLogits:
        """The record of a model."""
        return _kept.setdefault(model, KeptLogits())

    def add(self, values: Deferred, is_done: Callable[[], bool] = lambda: False) -> None:
        """Compute ``values`` of logits before the weights change, if anybody has them then.

        Once ``is_done()``, a gradient of the weights is no reason to compute them: what they were
        made for was computed.
        """
        self._pending[values] = is_done

    def watch(self, model: nn.Module, operands: Iterable[Any]) -> bool:
        """Watch those of ``operands`` that are parameters of ``model``; whether all are watched."""
        # a sharded one is not
        weights = [t for t in operands if isinstance(t, nn.Parameter)]
        if any(type(t) is not nn.Parameter or in_zero3(t) for t in weights):
            return False
        if all(map(self._is_watched, weights)):
            return True
        compute, compute_all = (
            weakref.WeakMethod(self.compute),
            weakref.WeakMethod(self.compute_all),
        )
        for module in model.modules():
            uses = [(t, name) for name, p in module._parameters.items() for t in weights if p is t]
            if uses:
                self._undo.append(_before_loading(module, compute_all))
            for weight, name in uses:
                self._watched[id(weight)] = weakref.ref(module), name
                if weight.requires_grad:
                    self._undo.append(_before_gradient(weight, compute))
        return all(map(self._is_watched, weights))

    def _is_watched(self, weight: nn.Parameter) -> bool:
        module, name = self._watched.get(id(weight), (lambda: None, ""))
        of = module()
        return of is not None and of._parameters.get(name) is weight

    def compute(self) -> None:
        """Compute them for an optimizer's step."""
        self._compute([v for v, is_done in self._pending.items() if not is_done()])

    def compute_all(self) -> None:
        """Compute them for a change that is rare."""
        self._compute(list(self._pending))

    def _compute(self, pending: list[Deferred]) -> None:
        for values in pending:
            del self._pending[values]
            try:
                values.values()
            except WeightsChanged:
                continue  # who reads it is told, and not who changes them once more
        if not self._pending:
            self._stop()

    def _stop(self) -> None:
        undo, self._undo = self._undo, []
        self._watched = {}
        for each in undo:
            each()


_kept: weakref.WeakKeyDictionary[nn.Module, KeptLogits] = weakref.WeakKeyDictionary()
_LOAD = "_load_from_state_dict"


def _before_loading(
    module: nn.Module, compute: weakref.WeakMethod[Callable[[], None]]
) -> Callable[[], None]:
    """Call ``compute`` before the module's own parameters are loaded; returns what undoes it."""

    def _load_from_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = compute()
        if run is not None:
            run()
        return getattr(type(self), _LOAD)(self, *args, **kwargs)

    if _LOAD in module.__dict__ and not _is_ours(module):
        return lambda: None
    # pickle stores a method by its name, which is the class's
    module.__dict__[_LOAD] = types.MethodType(_load_from_state_dict, module)

    reference = weakref.ref(module)

    def undo() -> None:
        target = reference()
        if target is not None and _is_ours(target):
            del target.__dict__[_LOAD]

    return undo


def _is_ours(module: nn.Module) -> bool:
    function = getattr(module.__dict__.get(_LOAD), "__func__", None)
    return getattr(function, "__module__", None) == __name__


def _before_gradient(
    weight: nn.Parameter, compute: weakref.WeakMethod[Callable[[], None]]
) -> Callable[[], None]:
    """Call ``compute`` when a gradient comes to ``weight``; returns what undoes it."""

    def hook(grad: Tensor) -> None:
        run = compute()
        if run is not None:
            run()

    handle: Any = weight.register_hook(hook)  # type: ignore[no-untyped-call]
    undo: Callable[[], None] = handle.remove
    return undo
