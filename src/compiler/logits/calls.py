"""What a call of a function does with logits: reads their values, describes, casts or writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_HISTORY = {
    "grad_fn", "grad", "is_leaf", "output_nr", "retains_grad", "_base", "_backward_hooks",
    "_version", "register_hook", "retain_grad", "requires_grad_",
}  # fmt: skip
_METADATA = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "itemsize",
    "is_sparse", "is_quantized", "is_meta", "is_nested", *_HISTORY,
}  # fmt: skip
_DESCRIBING = {
    "size", "dim", "numel", "is_floating_point", "is_complex", "nelement", "ndimension", "__len__",
    "element_size", "get_device", "is_contiguous", "stride", "is_inference", *_HISTORY,
}  # fmt: skip
_ACCESS = ("__get__", "__set__", "__delete__")
_CASTS = {"float", "double", "half", "bfloat16", "to"}
_COPIES = {"clone", "detach"}
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "deepspeed.")
_WRITES = {"__setitem__", *(f"__i{n}__" for n in ("add", "sub", "mul", "truediv", "pow"))}


def is_for_autograd(func: Any, name: str) -> bool:
    """Whether a function reads or changes what autograd knows of a tensor, and no values."""
    if name in _ACCESS:
        return getattr(func.__self__, "__name__", "") in _METADATA
    return name in _DESCRIBING or func in (torch.autograd.grad, torch.autograd.backward)


def depends_on_writes(func: Any, name: str) -> bool:
    """Whether a function has to do with values or with their history, and not with a shape."""
    if name in _ACCESS:
        name = getattr(func.__self__, "__name__", "")
        return name in _HISTORY or name not in _METADATA
    return name in _HISTORY or name not in _DESCRIBING


def is_gradient(func: Any, name: str) -> bool:
    """Whether a tensor's ``grad`` is read, set or deleted."""
    return name in _ACCESS and getattr(func.__self__, "__name__", "") == "grad"


def is_in_function() -> bool:
    """Whether the forward pass of an autograd.Function runs, a reentrant checkpoint's too."""
    # it disables forward-mode derivatives, as inference mode does; hardly anybody else does
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def may_save() -> bool:
    """Whether what is read now may have been saved as it is, without a tensor being given out."""
    return is_in_function() or _has_saved_tensors_hooks()


def reads_what_was_saved() -> bool:
    """Whether a backward pass runs, or what it computes once more, and is not differentiated."""
    is_plain = not torch.is_grad_enabled() or _has_saved_tensors_hooks()
    return torch._C._current_graph_task_id() != -1 and is_plain


def _has_saved_tensors_hooks() -> bool:
    """Whether hooks on saved tensors are set, as a checkpoint that is not reentrant does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def only_casts(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call casts to another dtype, and does nothing more, as ``to`` may."""
    return name in _CASTS and not kwargs and all(isinstance(a, torch.dtype) for a in args[1:])


def copies_for_wrapper(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a wrapper of the model copies, as DDP does, and not one who may keep the copy."""
    if name not in _COPIES or kwargs:
        return False
    caller = sys._getframe(2)
    while caller.f_back is not None and _name(caller).startswith("torch._dynamo."):
        caller = caller.f_back  # it calls what it does not trace
    return _name(caller).startswith(_WRAPPERS)


def _name(frame: Any) -> str:
    return str(frame.f_globals.get("__name__"))


def writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute outside the functorch transforms that are active."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield


def may_keep_history() -> bool:
    """Whether hooks on saved tensors may be set, which some transforms forbid."""
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return refused is None
