"""A head that a trainer puts in the place of a model's forward, computing in our tiles.

TRL's trainers give a model their own forward, which runs the backbone and computes
log-probabilities by an ``autograd.Function``. On an optimized model a copy of that forward runs,
whose globals hold a replacement of that function: ``linear_logprob``. The library, its modules and
its forward stay what they are, and ``restore`` puts the forward back.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.signatures import names_in
from ...kernels.loss.linear_logprob import linear_logprob
from ...sharding import in_zero3
from ..copies.forward_copies import cell_contents, clone_function, sets_globals
from ..logits.reads import Reads
from .forwards import Original

ASKED = "fused_lm_head"
"""The argument that asks such a forward for log-probabilities in place of logits."""
_REPLACED = "__fusewright_replaced__"
_WATCH = "__fusewright_watch__"
_ARGUMENTS = {"hidden", "weight", "bias", "targets", "temperature", "logit_scale", "outputs"}
_COMPACTS = "_use_triton"
"""Says whether only the rows that count are computed, which pays for tiles of any device."""


def with_our_head(function: Any, reads: Reads) -> Any:
    """A copy of a forward, wrappers included, that computes in our tiles; None if it cannot."""
    return _copy(function, frozenset(), reads)


def replaced_forward(forward: Any) -> Any:
    """The forward of a trainer in whose place ``forward``, a copy of it, runs; or None."""
    return getattr(getattr(forward, "__func__", None), _REPLACED, None)


class TrainerHead:
    """A head whose forward a trainer has replaced, or may replace."""

    def __init__(self, head: nn.Module, reads: Reads) -> None:
        self._head, self._reads = weakref.ref(head), reads
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._copies: dict[Any, Callable[..., Any]] = {}

    def function(self, original: Original, head: nn.Module) -> Callable[..., Any]:
        """What runs in a call whose forward a trainer had replaced before ``optimize``."""
        function = original.function(head)
        if function not in self._copies:
            copy = with_our_head(function, self._reads) if original.is_method else None
            self._copies[function] = original if copy is None else copy
        result: Callable[..., Any] = self._copies[function]
        return result

    def adopt(self, backbone: nn.Module) -> None:
        """Let such a forward compute in our tiles, from its next call on."""
        head = self._head()
        forward = None if head is None else head.__dict__.get("forward")
        function = getattr(forward, "__func__", None)
        if head is None or function is None or function in self._seen:
            return
        self._seen.add(function)
        if not any(m is backbone for m in head.modules()):  # a copy of the model calls
            return
        copy = with_our_head(function, self._reads)
        if copy is not None:
            setattr(copy, _REPLACED, forward)
            self._seen.add(copy)
            head.__dict__["forward"] = types.MethodType(copy, head)


def watch_training(backbone: nn.Module, fused: TrainerHead) -> None:
    """Find a trainer's forward before its first call: when the trainer calls ``train()``."""

    def train(self: nn.Module, mode: bool = True) -> Any:
        fused.adopt(self)
        return type(self).train(self, mode)

    setattr(train, _WATCH, True)  # pickle stores a method by its name, which is the class's
    backbone.__dict__["train"] = types.MethodType(train, backbone)


def is_training_watch(value: Any) -> bool:
    """Whether a module's attribute was put there by ``watch_training``."""
    return hasattr(getattr(value, "__func__", None), _WATCH)


def _copy(value: Any, outer: frozenset[int], reads: Reads) -> Any:
    """A copy of a function, or of a callable object around one; None where nothing is replaced."""
    if id(value) in outer:
        return None
    outer |= {id(value)}
    if isinstance(value, types.FunctionType):
        return _copy_function(value, outer, reads)
    if isinstance(value, (type, nn.Module, types.ModuleType)) or not callable(value):
        return None
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k != "__wrapped__"}
    copies = {k: c for k, v in attributes.items() if (c := _copy(v, outer, reads)) is not None}
    if not copies:
        return None
    result = object.__new__(type(value))
    result.__dict__.update({**value.__dict__, **copies})
    return result


def _copy_function(function: types.FunctionType, outer: frozenset[int], reads: Reads) -> Any:
    scope, cells = function.__globals__, function.__closure__ or ()
    replacements: dict[str, Any] = {
        name: _StandIn(scope[name], reads)
        for name in names_in(function.__code__)
        if _is_fused_head(scope.get(name))
    }
    inner = [_copy(cell_contents(cell), outer, reads) for cell in cells]
    if not replacements and not any(c is not None for c in inner):
        return None
    if replacements:
        if sets_globals(function.__code__):
            return None
        if callable(scope.get(_COMPACTS)):
            replacements[_COMPACTS] = lambda device: True
    return clone_function(function, {**scope, **replacements} if replacements else None, inner)


def _is_fused_head(value: Any) -> bool:
    """Whether a global is an autograd function of rows and a head, by its arguments."""
    if not (isinstance(value, type) and issubclass(value, torch.autograd.Function)):
        return False
    return set(inspect.signature(value.forward).parameters) >= _ARGUMENTS


class _StandIn:
    """Is called as an autograd function is; the results are in fp32."""

    def __init__(self, original: Any, reads: Reads) -> None:
        self._original, self._reads = original, reads
        self._signature = _without_ctx(original.forward)

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropy, log of the sum of squares, mean logit, is it the top one."""
        # as TRL's ``ChunkedLogProbFunction`` returns them; None where one is not asked for
        bound = self._signature.bind(*args)
        bound.apply_defaults()
        a = bound.arguments
        hidden, weight, bias, requested = a["hidden"], a["weight"], a["bias"], set(a["outputs"])
        if in_zero3(weight) or not requested <= set(_OUTPUTS):
            result: tuple[Tensor | None, ...] = self._original.apply(*args)
            return result
        self._reads.note_head("log-probabilities of the trainer's fused head")
        if not torch.is_autocast_enabled(hidden.device.type) and weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        names = ["logprob", *(_OUTPUTS[name] for name in _OUTPUTS if name in requested)]
        names = list(dict.fromkeys(names))
        results = linear_logprob(
            hidden, weight, bias, a["targets"], names, temperature=a["temperature"],
            softcap=a["final_logit_softcapping"], logit_scale=a["logit_scale"],
            deferred=("entropy", "sum_p2", "mean_logit"),
        )  # fmt: skip
        by_name = dict(zip(names, results, strict=True))
        return (
            by_name["logprob"],
            by_name.get("entropy"),
            None if "sum_p2" not in by_name else by_name["sum_p2"].detach().log(),
            None if "mean_logit" not in by_name else by_name["mean_logit"].detach(),
            None if "argmax" not in by_name else by_name["argmax"] == a["targets"],
        )


_OUTPUTS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_p2",
    "mean_logits": "mean_logit",
    "is_top1": "argmax",
}


def _without_ctx(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a ``forward``, as ``apply`` is called."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
