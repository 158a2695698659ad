"""Blocks that a captured head calls itself: in its graph, each call is one node.

A model whose list of blocks is a child of the module that computes the loss has no backbone that
could stay outside. TorchDynamo cannot break a graph within the loop over the blocks, either. So
a call of a block becomes a node, which calls the block as ever: it runs its own graph, or
bypasses it. What a block returns is known from an earlier call: a tensor like one of its inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor

from ...memory.levels import HOSTED
from ..session import Session

_Structure = Any
"""Of a result: the key of an argument that it is like, None, or a tuple of those."""


class ResultChanged(TorchDynamoException):
    """A block returned something else than in an earlier call."""


class Results:
    """What the blocks of one installation return."""

    def __init__(self) -> None:
        self._structures: weakref.WeakKeyDictionary[nn.Module, _Structure] = (
            weakref.WeakKeyDictionary()
        )
        self.is_recording = True

    def record(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Remember what ``block`` returns, as far as it is not known."""
        if self.is_recording and block not in self._structures:
            self._structures[block] = _structure(_by_key(args, kwargs), result)

    def any_unknown(self, blocks: Iterable[nn.Module]) -> bool:
        """Whether one of these blocks has not been called yet."""
        return any(block not in self._structures for block in blocks)

    def unsupported_reason(self, blocks: Iterable[nn.Module]) -> str | None:
        """Why these blocks, which have been called, can be no nodes of a graph, or None."""
        if any(self._structures.get(block) is _UNKNOWN for block in blocks):
            return "it calls its blocks itself, and they return no tensors like their inputs"
        return None

    def fake_result(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fake tensors like those that ``block`` returns."""
        return _make_fake(self._structures.get(block, _UNKNOWN), _by_key(args, kwargs))

    def check(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Raise unless ``result`` is what ``fake_result`` said."""
        if not _is_like(self._structures.get(block, _UNKNOWN), _by_key(args, kwargs), result):
            raise ResultChanged(f"{type(block).__name__} returned something else than before")


_UNKNOWN = object()


def _by_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    return {**dict(enumerate(args)), **kwargs}


def _is_similar(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.device == b.device


def _structure(given: dict[Any, Any], result: Any) -> _Structure:
    if result is None:
        return None
    if type(result) is tuple:
        parts = tuple(_structure(given, r) for r in result)
        return _UNKNOWN if _UNKNOWN in parts else parts
    if type(result) is not Tensor:
        return _UNKNOWN
    like = (k for k, v in given.items() if isinstance(v, Tensor) and _is_similar(v, result))
    return next(like, _UNKNOWN)


def _is_like(structure: _Structure, given: dict[Any, Any], result: Any) -> bool:
    if structure is None or structure is _UNKNOWN:
        return structure is result
    if type(structure) is tuple:
        return (
            type(result) is tuple
            and len(result) == len(structure)
            and all(_is_like(s, given, r) for s, r in zip(structure, result, strict=True))
        )
    return type(result) is Tensor and _is_similar(given[structure], result)


def _make_fake(structure: _Structure, given: dict[Any, Any]) -> Any:
    if structure is _UNKNOWN:
        raise ResultChanged("what a block returns is not known")
    if structure is None:
        return None
    if type(structure) is tuple:
        return tuple(_make_fake(s, given) for s in structure)
    fake = torch.empty_like(given[structure])
    # whether a block's weights are trained can change: with gradients on, its output may need one
    needs = torch.is_grad_enabled() and fake.is_floating_point()
    return fake.requires_grad_().clone() if needs else fake


def callable_from_head(
    session: Session, results: Results, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a block that a captured head calls itself; ``forward`` is its captured one."""
    modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def block(key: int, *args: Any, **kwargs: Any) -> Any:
        module = modules[key]
        if any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values())):
            return results.fake_result(module, args, kwargs)
        active, session.state.in_head = session.state.in_head, False
        try:
            result = forward(module, *args, **kwargs)
        finally:
            session.state.in_head = active
        # those that nothing else keeps would fill the device
        is_kept = torch.is_grad_enabled() and session.choices.planner.level(module) not in HOSTED
        if session.state.replay is not None and is_kept:
            session.state.replay.note(module, result)
        results.check(module, args, kwargs, result)
        return result

    as_node = torch._dynamo.allow_in_graph(block)  # type: ignore[no-untyped-call]

    def in_head_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.state.in_head and self not in session.log.restored:
            return as_node(id(self), *args, **kwargs)
        modules[id(self)] = self
        saved = session.state.replayed(self)
        if saved is not None:
            return saved[0]
        result = forward(self, *args, **kwargs)
        results.record(self, args, kwargs, result)
        return result

    return in_head_forward
