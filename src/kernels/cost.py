"""What running something costs, found on fake tensors, which have shapes and no contents.

FLOPs are those that PyTorch's own counter knows (matrix products, convolutions, attention), and
those of our opaque ops, by the formulas that ``launch.library_op`` gives it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import conv_flop_count, flop_registry

from .launch import TEMPORARY_BYTES
from .saved_tensors import saved_by_hook


@dataclass(frozen=True)
class Cost:
    """What one call of an op moves, computes and keeps."""

    bytes_read: int  # of the tensors that forward is given: what it reads at least
    bytes_written: int  # of those that it returns
    flops: int  # of forward; a multiply-add is two
    # for backward; inputs count, though another op may keep them too; parameters do not
    bytes_saved: int


class Living(TorchDispatchMode):
    """Counts the bytes of the storages created under it that are still alive, and FLOPs so far.

    ``most`` is the highest that ``bytes`` has been since it was last reset.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # 2026-11-25: torch is not typed here
        self.flops = self.bytes = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what is new in its result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _formula(getattr(func, "_overloadpacket", None))
        self.flops += 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        temporary = TEMPORARY_BYTES.get(func)
        temporary_bytes = 0 if temporary is None else temporary(*args, **kwargs)
        self.most = max(self.most, self.bytes + temporary_bytes)
        return out

    def exclude(self, tensors: Iterable[Any]) -> None:
        """Do not count the memory of ``tensors``."""
        self._known.update(t.untyped_storage() for t in tensors if isinstance(t, Tensor))

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.bytes -= size


@functools.cache
def _formula(packet: Any) -> Any:
    """How PyTorch's counter counts an operation, or the same one under another name; or None."""
    name = getattr(packet, "__name__", "")
    other = _SAME.get(name) or (name.removesuffix("_") if name in _IN_PLACE else None)
    if packet is torch.ops.aten.convolution_backward:
        return _of_convolution_backward
    if other is not None and packet is getattr(torch.ops.aten, name, None):
        packet = getattr(torch.ops.aten, other, packet)
    formula = flop_registry.get(packet)
    first = _FIRST_QUERY.get(getattr(packet, "__name__", ""))
    return formula if first is None else functools.partial(_of_attention, formula, first)


def _of_attention(formula: Any, first: int, *args: Any, **kwargs: Any) -> int:
    # PyTorch 2.11's counter refuses heads of queries that share one of keys
    q, k, v = args[first : first + 3]
    k, v = (t[:, :1].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return int(formula(*args[:first], q, k, v, *args[first + 3 :], **kwargs))


def _of_convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None, **_: Any
) -> int:
    # As many as forward has, for each of both gradients that is needed.
    # PyTorch's counter takes the weight's for that of one group (torch 2.13).
    transposed, mask = rest[4], rest[7]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (bool(mask[0]) + bool(mask[1]))


_IN_PLACE = ("addmm_", "baddbmm_")
_FLASH = "_scaled_dot_product_flash_attention"
_FIRST_QUERY = {
    f"_scaled_dot_product_{kind}_attention{tail}": first
    for kind in ("flash", "efficient", "cudnn")
    for tail, first in (("", 0), ("_backward", 1))
}
"""Which argument the queries are; keys and values follow."""

_SAME = {f"{_FLASH}_for_cpu": _FLASH, f"{_FLASH}_for_cpu_backward": f"{_FLASH}_backward"}


def cost(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Count what ``call(*args, **kwargs)`` costs, without computing it.

    Tensors may be nested in tuples and lists, of any device, fake or real; so may the results.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes: dict[int, Any] = {}
        args, kwargs = tree_map(lambda v: fakes.setdefault(id(v), _fake(v)), (args, kwargs))
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        parameters = {_place(t) for t in tensors if isinstance(t, nn.Parameter)}
        saved: dict[int, Any] = {}

        def pack(t: Tensor) -> Tensor:
            if _place(t) not in parameters:
                saved[_place(t)] = t.untyped_storage()
            return saved_by_hook(t)

        with Living() as living, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results = [t for t in tree_iter(call(*args, **kwargs)) if isinstance(t, Tensor)]
        return Cost(
            bytes_read=sum(t.nbytes for t in {id(t): t for t in tensors}.values()),
            bytes_written=sum(t.nbytes for t in results),
            flops=living.flops,
            bytes_saved=sum(storage.nbytes() for storage in saved.values()),
        )


def _place(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def like(t: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """An empty tensor with the dtype, device and ``requires_grad`` of ``t``."""
    result = torch.empty_strided(shape, strides, dtype=t.dtype, device=t.device)
    return result.requires_grad_(t.requires_grad)


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    fake = like(value, value.shape, value.stride())
    return nn.Parameter(fake, fake.requires_grad) if isinstance(value, nn.Parameter) else fake
