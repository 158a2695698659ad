"""Weights that an engine has taken apart again, for whoever reads logits late.

Logits are computed when somebody reads them, which may be after the head's parameters were released
on this process. They are gathered once more then, as eager mode did before; so every process must
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def gathered(model: nn.Module | None, values: Iterable[Any]) -> Iterator[None]:
    """While ``values`` are computed with: the parameters among them are whole.

    Args:
        model: whose parameters they are; None if it is gone.
        values: anything.

    Raises:
        RuntimeError: one is not whole, and cannot be gathered.
    """
    with ExitStack() as stack:
        for value in values:
            if isinstance(value, Tensor) and _is_released(value):
                gather, release = _engine(model, value)
                gather()
                stack.callback(release)
        yield


def _is_released(tensor: Tensor) -> bool:
    status = getattr(tensor, "ds_status", None)  # DeepSpeed's, of ZeRO-3
    if status is not None:
        return getattr(status, "name", "") != "AVAILABLE"
    if type(tensor) not in (Tensor, nn.Parameter):
        return False  # a subclass may have no memory of its own
    # FSDP frees the memory of a whole parameter, and leaves its shape
    return tensor.numel() > 0 and not tensor.is_meta and tensor.untyped_storage().size() == 0


def _engine(
    model: nn.Module | None, tensor: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    if hasattr(tensor, "ds_status"):
        return tensor.all_gather, tensor.partition
    for unit in _units(model):
        groups = getattr(unit, "_fsdp_param_groups", None) or [unit._fsdp_param_group]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            if getattr(parameter, "_unsharded_param", None) is tensor:
                module: Any = unit._modules[0]
                return module.unshard, module.reshard
    raise RuntimeError(
        "these logits were not read before the parameters that make them were released again by "
        "what shards them. Read them earlier, or use fusewright.optimize(model, logits='always')."
    )


def _units(model: nn.Module | None) -> list[Any]:
    """The states of all units of FSDP2 that ``model`` is part of."""
    for module in () if model is None else model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        if state is not None:
            return list(state._state_ctx.all_states)
    return []
