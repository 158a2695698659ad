"""Logits whose memory is filled when their values are first read.

``outputs.logits`` of a training step is read by metrics and by custom losses, and by nothing else;
for a large vocabulary it is the largest tensor of the step. A ``LazyLogits`` takes its place: a
tensor with shape, dtype, history and version counter, whose memory does not exist yet.

- Views of it are views in the same memory, made by PyTorch itself.
- Casts, scales, choices of rows and log-softmaxes are pending tensors in other memory.
- The functions of ``endings.py`` compute losses and log-probabilities in tiles, from the rows and
  the head's weight.
- Everything else fills the memory. From then on all of PyTorch (in-place writes, aliases, hooks,
  versions) works on an ordinary tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map

from .head_call import HeadCall, Operands
from .lazy_gradient import LazyGradient, describes, without_values

aten = torch.ops.aten


class NotInTiles(Exception):
    """Raised where a function needs the values of logits."""


@dataclass(eq=False)
class Buffer:
    """The memory of logits, or of what is made of them row by row.

    Attributes:
        index: (N,), the rows of the call; None for all of them.
        kind: ``"logits"`` or ``"log_probs"``.
        factor: multiplies the logits, before a log-softmax.
        weight: multiplies everything, after it.
        steps: compute the values (N, vocabulary) from the rows of the call's logits.
        root: the memory of all logits of the call; None if it is this one.
        endings: the functions that are computed in tiles, by name.
        values: the values, once they are computed.
        picked: single values that were returned before: (row, column, value), (N, K) each.
    """

    call: HeadCall
    inputs: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    endings: Mapping[str, Answer]
    keep_history: bool = False
    index: Tensor | None = None
    kind: str = "logits"
    factor: float = 1.0
    weight: float = 1.0
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    root: Buffer | None = None
    values: Tensor | None = None
    picked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    derived: list[weakref.ref[Buffer]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return prod(self.shape[:-1])

    def fill(self) -> Tensor:
        """The values, without a history; computed at the first call."""
        with _filling:
            if self.values is None:
                with outside_transforms(), torch.inference_mode(False):
                    values = self._compute().reshape(self.shape)
                    flat = values.view(-1, values.shape[-1])
                    for rows, columns, picked in self.picked:
                        flat[rows, columns] = picked  # a product of one row may round otherwise
                    self.values, self.root = values, None
                derived, self.derived = self.derived, []
                for reference in derived:  # before anything is written to these values
                    if (memory := reference()) is not None:
                        memory.fill()
            return self.values

    def _compute(self) -> Tensor:
        if self.root is None:
            return self.call.compute(self.inputs, self.keep_history).contiguous()
        count = self.call.rows
        if self.root.values is None and self.index is not None and 2 * len(self.index) < count:
            return self.compute_again()
        values = self.root.fill().view(count, -1)
        return self._run_steps(values if self.index is None else values[self.index])

    def compute_again(self) -> Tensor:
        """Compute the values (N, vocabulary) from rows and head, whatever was written to them."""
        values = self.call.compute(self.inputs, False, self.index)
        return self._run_steps(values.reshape(-1, values.shape[-1]))

    @torch.no_grad()
    def _run_steps(self, values: Tensor) -> Tensor:
        source = values
        for step in self.steps:
            values = step(values)
        return values.clone() if values is source else values

    def operands(self, inputs: tuple[Any, ...]) -> Operands:
        """The operands of the head's op, made of ``inputs``; raises NotInTiles."""
        head = self.call.plan.head
        if head is None or not _MOST_SCALE > self.factor > 1.0 / _MOST_SCALE:
            raise NotInTiles
        return head.of(inputs, self.index, self.factor)


_MOST_SCALE = 1e30
_filling = threading.RLock()
Answer = Callable[["LazyLogits", tuple[Any, ...], dict[str, Any]], Any]
"""A function of pending logits, its other arguments, and its keyword arguments."""


class LazyLogits(Tensor):
    """A tensor in a ``Buffer`` that may be pending."""

    memory: Buffer
    _has_memory = False

    @staticmethod
    def of(memory: Buffer) -> LazyLogits:
        """The tensor of a whole memory."""
        z: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, memory.shape, strides=contiguous_strides(memory.shape), dtype=memory.dtype,
            device=memory.call.device,
        )  # fmt: skip
        z.memory = memory
        torch._C._set_throw_on_mutable_data_ptr(z)  # for code that reads memory without PyTorch
        return z

    @property
    def is_pending(self) -> bool:
        """True until its values are read."""
        return self.memory.values is None

    def fill(self) -> None:
        """Compute the values now, and become an ordinary tensor."""
        if self._has_memory:
            return
        storage = self.memory.fill().untyped_storage()
        # below autograd: history, views and versions stay
        below = torch._C._AutoDispatchBelowADInplaceOrView()
        with outside_transforms(), torch._C._DisableTorchDispatch(), below:
            aten.set_.source_Storage_storage_offset(
                self, storage, self.storage_offset(), self.size(), self.stride()
            )
        self._has_memory = True

    def places(self) -> Tensor:
        """(N,): the rows of the memory in this tensor; raises NotInTiles for parts of rows."""
        shape, strides, classes = self.size(), self.stride(), self.memory.shape[-1]
        offset = self.storage_offset()
        whole = bool(shape) and shape[-1] == classes and (strides[-1] == 1 or classes == 1)
        if not whole or self.dtype is not self.memory.dtype:
            raise NotInTiles
        if any(s % classes for s in (offset, *strides[:-1])):
            raise NotInTiles
        count = self.memory.rows if self.numel() else 0
        every = torch.arange(count, device=self.device)
        if not self.numel():
            return every
        leading = [s // classes for s in strides[:-1]]
        return every.as_strided(shape[:-1], leading, offset // classes).reshape(-1)

    def chosen(self) -> Buffer:
        """The rows of this tensor as a memory of its own; raises NotInTiles for parts of rows."""
        memory, shape = self.memory, tuple(self.size())
        if shape == memory.shape and self.stride() == contiguous_strides(shape):
            return memory
        rows = self.places()
        if len(rows) == memory.rows and self.is_contiguous():
            index = memory.index
        else:
            index = rows if memory.index is None else memory.index[rows]
        root = memory if memory.root is None else memory.root
        return replace(memory, shape=shape, index=index, root=root, picked=[], derived=[])

    @classmethod
    # a compiler leaves out what is computed of these
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # 2026-11-28: torch has no type
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = _answer(func, args, kwargs)
            if result is NotImplemented:
                name = getattr(func, "__name__", "")
                if name in _PLAIN and not args[0].requires_grad:
                    args = (args[0]._alias(), *args[1:])
                elif name == "register_hook":
                    _ = args[0].grad_fn  # of a view: 2.13 crashes if it makes this with a hook
                result = func(*args, **kwargs)
        if isinstance(result, LazyLogits) and result.is_pending and not result.requires_grad:
            result.memory.call.detached.append(weakref.ref(result))
        # a gradient that is asked for is wanted now: later, the graph may be gone
        return tree_map(_real_gradient, result) if func is torch.autograd.grad else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-24: torch types it as a method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if isinstance(first, LazyLogits) and first.is_pending:
            result = _pending_result(func, first, args[1:], kwargs)
            if result is not None:
                return result
        originals = args
        with enable_reentrant_dispatch():
            _fill_all(func, (args, kwargs))
            real = {z: z._alias() for z in tree_leaves((args, kwargs)) if isinstance(z, LazyLogits)}
            args, kwargs = tree_map(lambda x: _real(x, real), (args, kwargs))
            if torch.Tag.inplace_view in func.tags:  # it changes sizes or memory of the tensor
                with torch._C._DisableTorchDispatch():
                    return func(*originals, **kwargs)
        result = func(*args, **kwargs)
        given = {alias: z for z, alias in real.items()}  # what writes in place returns its argument
        return tree_map(lambda x: given.get(x, x) if isinstance(x, Tensor) else x, result)

    def _alias(self) -> Tensor:
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowADInplaceOrView():
            alias: Tensor = aten.alias(self)
        return alias

    def __repr__(  # type: ignore[override]  # 2026-11-24: torch calls the argument otherwise
        self, *, tensor_contents: Any = None
    ) -> str:
        self.fill()
        return repr(self.view(self.shape))

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.fill()
        return self.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        self.fill()
        return self.detach().clone()


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute outside the functorch transforms that are active."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield


def _real_gradient(x: Any) -> Any:
    return x.values() if isinstance(x, LazyGradient) else x


def _real(x: Any, aliases: dict[LazyLogits, Tensor]) -> Any:
    return aliases[x] if isinstance(x, LazyLogits) else _real_gradient(x)


def _fill_all(func: Any, values: Any) -> None:
    for z in tree_leaves(values):
        if isinstance(z, LazyLogits):
            if z.is_pending:
                z.memory.call.plan.reads.note_tensor(func, z.memory.kind)
            z.fill()


# ---------------------------------------------------------------------- functions, above autograd

_PLAIN = {"numpy", "__array__", "__dlpack__", "tolist"}
"""Functions that PyTorch refuses to subclasses of tensors."""
_PENDING = {
    "__getitem__", "__iter__", "split", "chunk", "unbind", "select", "narrow", "squeeze",
    "unsqueeze", "view", "reshape", "flatten", "expand", "contiguous", "detach", "index_select",
    "to", "float", "double", "half", "bfloat16", "type_as", "log_softmax",
    "mul", "__mul__", "__rmul__", "div", "__truediv__", "neg", "__neg__",
}  # fmt: skip
"""Functions that ``_pending_result`` may answer."""


def _needs_no_values(func: Any, name: str) -> bool:
    if describes(func, name):
        return True
    if name == "clone":  # of a wrapper's function, as DDP's; any other copy is to be kept
        return is_in_function()
    return name in _PENDING or func in (torch.autograd.grad, torch.autograd.backward)


def is_in_function() -> bool:
    """True in the forward pass of an autograd.Function."""
    # it disables forward-mode derivatives, as inference mode does; hardly anything else does
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute ``func`` in tiles; else NotImplemented, with memory filled where it is needed."""
    if isinstance(func, torch._ops.OpOverload):  # its dispatch decides
        return NotImplemented
    name = getattr(func, "__name__", "")
    first = args[0] if args else kwargs.get("input")
    if isinstance(first, LazyLogits) and first.is_pending and name in first.memory.endings:
        others = {k: v for k, v in kwargs.items() if k != "input"}
        answer = first.memory.endings[name](first, args[1:], others)
        if answer is not NotImplemented:
            return answer
    if not _needs_no_values(func, name):
        _fill_all(func, (args, kwargs))
    return NotImplemented


# ---------------------------------------------------------------------- operators, below autograd


def _pending_result(func: Any, z: LazyLogits, rest: Any, kwargs: Any) -> Any:
    """The pending result of an operator on pending logits; None where it needs the values."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
        return func.decompose(z, *rest, **kwargs)  # in inference mode nothing else does it
    if func.is_view or func is aten._unsafe_view.default:
        like = without_values(z)
        made, memory = func(like, *rest, **kwargs), like.untyped_storage()._cdata
        parts = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        if any(t.dtype != z.dtype or t.untyped_storage()._cdata != memory for t in parts):
            return None
        return tree_map(lambda t: _view(z, t) if isinstance(t, Tensor) else t, made)
    if func not in _DERIVED or z.memory.call.plan.head is None:
        return None
    try:
        memory = z.chosen()
        changes = _DERIVED[func](memory, *rest, **kwargs)
    except NotInTiles:
        return None
    root = memory if memory.root is None else memory.root
    given = {"root": root, "picked": [], "derived": [], "values": None, **changes}
    derived = LazyLogits.of(replace(memory, **given))
    for source in {id(m): m for m in (z.memory, root)}.values():  # each may be written to
        source.derived.append(weakref.ref(derived.memory))
    return derived


def _view(z: LazyLogits, like: Tensor) -> LazyLogits:
    """The view of ``z`` that ``like`` is of a tensor of the form of ``z``."""
    with torch._C._DisableTorchDispatch():
        offset = z.storage_offset() + like.storage_offset()
        part = aten.as_strided.default(z, like.size(), like.stride(), offset)
    view = Tensor._make_subclass(LazyLogits, part)
    view.memory = z.memory
    return view


def _changed(memory: Buffer, step: Callable[[Tensor], Tensor], **changes: Any) -> dict[str, Any]:
    return {"steps": (*memory.steps, step), **changes}


def _cloned(memory: Buffer, *, memory_format: Any = None) -> dict[str, Any]:
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        raise NotInTiles
    return {}


def _cast(memory: Buffer, *, dtype: Any = None, **more: Any) -> dict[str, Any]:
    same = (None, False, memory.call.device, torch.strided, torch.preserve_format)
    if dtype is None or not dtype.is_floating_point or any(v not in same for v in more.values()):
        raise NotInTiles
    return _changed(memory, lambda t: t.to(dtype), dtype=dtype)


def _scaled(memory: Buffer, by: Any, step: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    name = "factor" if memory.kind == "logits" else "weight"
    by = getattr(memory, name) * by
    if not 1.0 / _MOST_SCALE < abs(by) < _MOST_SCALE:
        raise NotInTiles
    return _changed(memory, step, **{name: by})


def _number(x: Any) -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool) or x == 0:
        raise NotInTiles
    return x


def _multiplied(memory: Buffer, other: Any) -> dict[str, Any]:
    return _scaled(memory, _number(other), lambda t: t * other)


def _divided(memory: Buffer, other: Any) -> dict[str, Any]:
    return _scaled(memory, 1.0 / _number(other), lambda t: t / other)


def _negated(memory: Buffer) -> dict[str, Any]:
    return _scaled(memory, -1.0, torch.neg)


def _log_softmax(memory: Buffer, dim: int, half_to_float: bool) -> dict[str, Any]:
    if memory.kind != "logits" or dim not in (-1, len(memory.shape) - 1) or half_to_float:
        raise NotInTiles
    return _changed(memory, lambda t: aten._log_softmax(t, -1, False), kind="log_probs")


def _indexed(memory: Buffer, indices: Any) -> dict[str, Any]:
    """Rows that tensors choose; ``indices`` are one for each dimension, or for the first ones."""
    rows = torch.arange(memory.call.rows, device=memory.call.device)
    rows = (rows if memory.index is None else memory.index).view(memory.shape[:-1])
    used = sum(i.dim() if i.dtype is torch.bool else 1 for i in indices if i is not None)
    used += sum(i is None for i in indices)
    if used > rows.dim():
        raise NotInTiles
    chosen = aten.index(rows, indices)
    return {"index": chosen.reshape(-1), "shape": (*chosen.shape, memory.shape[-1])}


def _selected(memory: Buffer, dim: int, index: Tensor) -> dict[str, Any]:
    dim = dim % len(memory.shape)
    return _indexed(memory, [None] * dim + [index])


_DERIVED: dict[Any, Callable[..., dict[str, Any]]] = {
    aten.clone.default: _cloned, aten._to_copy.default: _cast,
    aten.mul.Tensor: _multiplied, aten.mul.Scalar: _multiplied,
    aten.div.Tensor: _divided, aten.div.Scalar: _divided, aten.neg.default: _negated,
    aten._log_softmax.default: _log_softmax,
    aten.index.Tensor: _indexed, aten.index_select.default: _selected,
}  # fmt: skip
"""Operators whose results are rows of logits too: the changes of the memory that each makes."""
