"""Which parameters processes share, who shards them, and how one is made whole again.

FSDP2 and tensor parallelism make a parameter a ``DTensor``. ZeRO-3 leaves it without elements, with
its share and its whole size as attributes. FSDP1 frees the memory of a parameter that is whole by
its size. No engine is imported here: one that nobody has imported shards nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .upstream import changed

# --- a parameter ----------------------------------------------------------------------------------


def in_zero3(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 shards a parameter."""
    return hasattr(tensor, "ds_id")


def is_dtensor(tensor: Any) -> bool:
    """Whether FSDP2 or tensor parallelism shards a tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Any) -> bool:
    """Whether this process has a share of a parameter only, or gathers it when it is used."""
    return in_zero3(tensor) or is_dtensor(tensor)


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of ``model`` is sharded by now."""
    return any(map(is_sharded, model.parameters()))


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter on one process alone."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a ``DTensor``; a collective if it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_share(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, without a collective and without a history."""
    tensor = tensor.detach()
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_released(tensor: Tensor) -> bool:
    """Whether an engine has freed the memory of a parameter that it gathers for each use."""
    if in_zero3(tensor):
        return getattr(tensor.ds_status, "name", "") != "AVAILABLE"  # type: ignore[attr-defined]
    if type(tensor) not in (Tensor, nn.Parameter):
        return False  # the memory of a subclass may be elsewhere
    # FSDP frees the memory of a whole parameter, and leaves its shape
    return tensor.numel() > 0 and not tensor.is_meta and tensor.untyped_storage().size() == 0


class Gathering(NamedTuple):
    """What makes a parameter whole, and takes it apart again, in the processes of a group."""

    gather: Callable[[], object]
    release: Callable[[], object]
    group: Any


def gathering_of(model: nn.Module | None, tensor: Any) -> Gathering | None:
    """How a parameter of ``model``, or an alias of one, is gathered; None: in no known way."""
    if changed("DeepSpeed" if in_zero3(tensor) else "FSDP2") is not None:
        return None
    if in_zero3(tensor):
        return Gathering(tensor.all_gather, tensor.partition, tensor.ds_process_group)
    for module in () if model is None else model.modules():
        state = _fsdp2_state(module)
        for unit in () if state is None else state._state_ctx.all_states:
            for group in getattr(unit, "_fsdp_param_groups", None) or [unit._fsdp_param_group]:
                for parameter in () if group is None else group.fsdp_params:
                    if _shares_memory(getattr(parameter, "_unsharded_param", None), tensor):
                        first = unit._modules[0]
                        shard = getattr(group.mesh_info, "shard_process_group", None)
                        return Gathering(first.unshard, first.reshard, shard)
    return None


def _shares_memory(a: Any, b: Tensor) -> bool:
    """Whether one is the other, or an alias of it."""
    plain = (Tensor, nn.Parameter)
    if type(a) not in plain or type(b) not in plain:
        return a is b
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


# --- a module -------------------------------------------------------------------------------------


def _fsdp2_state(module: nn.Module) -> Any:
    """What FSDP2 keeps of ``module``, one of its units; None: it is none."""
    return getattr(module, "_get_fsdp_state", lambda: None)()


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered for a forward without a backward, before weights change."""
    # of its root, it would use the gathered weights once more
    for module in model.modules():
        if _fsdp2_state(module) is not None:
            module.reshard()  # type: ignore[operator]


def fsdp2_casts(module: nn.Module) -> tuple[Any, Any]:
    """The dtypes that FSDP2 casts inputs and outputs of ``module`` to; None: it does not."""
    policy = getattr(_fsdp2_state(module), "_mp_policy", None)
    if policy is None:
        return None, None
    return policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype


def class_before_fsdp2(module: nn.Module) -> Any:
    """The class that ``module`` was of before FSDP2 put one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def gathers(module: nn.Module) -> bool:
    """Whether a module has forward hooks that gather and release parameters, and no others."""
    origins = _hook_origins(module)
    if not origins or not all(origin.startswith(tuple(_GATHERING)) for origin in origins):
        return False
    return unreadable(module) is None


def unreadable(module: nn.Module) -> str | None:
    """Why it cannot be known what an engine that shards a module does; None: it can, or none is."""
    for origin in _hook_origins(module):
        for start, engine in _GATHERING.items():
            if origin.startswith(start) and (reason := changed(engine)) is not None:
                return reason
    return None


def divided_by(module: nn.Module) -> str | None:
    """What divides the work of a module between processes, as its hooks say; None: nothing."""
    # they exchange values before or after its forward, which no captured graph may leave out
    for origin in _hook_origins(module):
        for engine, name in _DIVIDING.items():
            if origin.startswith(engine):
                return name
    return None


def collectives_of(model: nn.Module) -> str | None:
    """What would run a collective if ``model`` were called, in words; None if nothing is known to.

    With one process, nothing does. A model inside ``DistributedDataParallel`` is called without
    one; the wrapper is not.
    """
    if not has_peers():
        return None
    for path, module in model.named_modules():
        if any(map(is_sharded, module.parameters(recurse=False))):
            return "its parameters are sharded"
        for name in (*(kind.__module__ for kind in type(module).__mro__), *_hook_origins(module)):
            if name.startswith(_COMMUNICATING) and not name.startswith(_LOCAL):
                where = f"{path} is" if path else "it is"
                return f"{where} wrapped by {'.'.join(name.split('.')[:3])}"
    return None


def has_peers() -> bool:
    """Whether ``torch.distributed`` is initialized with several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


_GATHERING = {
    "torch.distributed.fsdp._fully_shard.": "FSDP2",
    "deepspeed.runtime.zero.": "DeepSpeed",
    "deepspeed.utils.nvtx": "DeepSpeed",  # which hides some of the hooks of the one before
}
"""Where the hooks of an engine are from -> the engine, a part of ``upstream.PARTS``."""
_DIVIDING = {
    "torch.distributed.tensor": "tensor parallelism",
    "accelerate.big_modeling": "context parallelism",
}
_COMMUNICATING = (
    "torch.distributed.",
    "torch.nn.parallel.distributed",
    "deepspeed.",
    "transformers.integrations.tensor_parallel",
)
_LOCAL = ("torch.distributed.algorithms._checkpoint.",)
"""Modules of these that only run the model; they send nothing."""


def _hook_origins(module: nn.Module) -> list[str]:
    """The Python modules that the functions behind the hooks around a forward are from."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return list(map(_origin, hooks))


def _origin(hook: Any) -> str:
    origin = _origins.get(hook) if isinstance(hook, types.FunctionType) else None
    if origin is None:
        function = hook.func if isinstance(hook, functools.partial) else hook
        function = inspect.unwrap(getattr(function, "__func__", function))
        origin = str(getattr(function, "__module__", ""))
        if isinstance(hook, types.FunctionType):
            _origins[hook] = origin
    return origin


_origins: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
