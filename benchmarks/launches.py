"""The launches of Triton kernels that ops make, as the JIT would make them, without a GPU.

Ops run on fake tensors: nothing is computed, and their launchers see the real shapes, strides and
dtypes. Each launch is noted where Triton's ``JITFunction`` would make it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusewright.kernels import launch
from fusewright.kernels.processor import KINDS, assume
from fusewright.rewrite.op_table import OPS
from op_cases import Maker, op_of


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        args: its arguments; tensors as their dtypes.
        options: constexpr arguments by name, and options such as ``num_warps``.
        grid: how many programs, in up to three dimensions.
        bytes: of the tensors that it is given, each once.
        backward: whether a backward pass made it.
    """

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]
    bytes: int = 0
    backward: bool = False

    @property
    def name(self) -> str:
        """The kernel's name without what all have in common."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")

    @property
    def full_name(self) -> str:
        """The name, after that of the kernel's file."""
        file = self.kernel.fn.__module__.rpartition(".")[2].removesuffix("_triton")
        return f"{file}.{self.name}"

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies tiles, itself or in a function that it calls."""
        return "tl.dot(" in _source(self.kernel)


def _source(kernel: Any) -> str:
    """The source of a kernel and of the functions that it calls."""
    from triton.runtime.jit import JITFunction

    found, left = {kernel}, [kernel]
    while left:
        caller = left.pop()
        others = (f for f in caller.fn.__globals__.values() if isinstance(f, JITFunction))
        called = {f for f in others if re.search(rf"\b{f.__name__}\(", caller.src)}
        left += called - found
        found |= called
    return "\n".join(f.src for f in found)


@dataclass(frozen=True, eq=False)
class _Dtype:
    """What is left of a tensor."""

    dtype: torch.dtype


def launches_of(op: str, maker: Maker, gpu: launch.Gpu) -> list[Launch]:
    """The launches of one call of an op and of its backward pass.

    Args:
        op: a name in ``op_cases.CASES``.
        maker: of the case; it must make CPU tensors.
        gpu: that they are for.
    """
    call = next(o for o in OPS if o.name == op_of(op)).call
    with FakeTensorMode(), as_on_a_gpu(gpu) as found:
        case = maker.make(op)
        outputs = [o for o in tree_leaves(call(*case.args)) if isinstance(o, Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        forward = len(found)
        if outputs and case.leaves():
            upstream = [torch.empty_like(o) for o in outputs]
            torch.autograd.grad(outputs, case.leaves(), upstream, allow_unused=True)
    return [replace(one, backward=i >= forward) for i, one in enumerate(found)]


def bytes_of(tensors: Iterable[Any]) -> int:
    """The memory of tensors, each once, and repeated elements once."""
    found: dict[Any, int] = {}
    for t in tensors:
        if isinstance(t, Tensor):
            own = min(t.numel() * t.itemsize, t.untyped_storage().nbytes())
            place = (t.untyped_storage()._cdata, t.storage_offset())
            found[place] = max(found.get(place, 0), own)
    return sum(found.values())


@contextlib.contextmanager
def as_on_a_gpu(gpu: launch.Gpu) -> Iterator[list[Launch]]:
    """Let ops on fake CPU tensors choose as they do on a GPU; gives the launches they make.

    Their launchers run in place of what tells shapes to a tracer. Autograd's engine goes through
    fake CPU tensors, and not through fake CUDA ones where PyTorch was built without CUDA.
    """
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kept = tuple(_Dtype(a.dtype) if isinstance(a, Tensor) else a for a in args)
        found.append(Launch(self, kept, options, tuple(grid), bytes_of(args)))

    own = JITFunction.run, launch._INTERPRETING, launch._ELSEWHERE
    JITFunction.run, launch._INTERPRETING, launch._ELSEWHERE = run, True, gpu
    try:
        # nothing is widened for this machine's processor, whatever it is
        with warnings.catch_warnings(), assume(KINDS["amx"]), _Launchers():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield found
    finally:
        JITFunction.run, launch._INTERPRETING, launch._ELSEWHERE = own


class _Launchers(TorchDispatchMode):
    """Runs what the library ops are made of, down to the kernels' launchers."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # captured graphs run under it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run: Callable[..., Any] = func
        launches = launch.LAUNCHES.get(func)
        opaque = launches is None and func in launch.IMPLEMENTATIONS
        if opaque or (launches is not None and launches(*args)):
            run = launch.RUNS[func]
        with self if run is not func else contextlib.nullcontext():
            try:
                return run(*args, **kwargs)
            except DataDependentOutputException:
                if not opaque:
                    raise
        return func(*args, **kwargs)  # PyTorch's operators by what is in an input
