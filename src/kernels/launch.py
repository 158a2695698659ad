"""Launch Triton kernels: where they run, how they become opaque ops, and how they are called.

Nothing here imports Triton before a tensor asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

from .choice import CandidateOp, Implementation, drawn
from .fallback import with_plain_form

_LIBRARY = torch.library.Library("fusewright", "DEF")

TEMPORARY_BYTES: dict[Any, Callable[..., int]] = {}
"""Library op -> the bytes that a call with these arguments holds only while it runs."""

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Library op -> the function that implements it, unless that is a Triton kernel's launcher."""

RUNS: dict[Any, Callable[..., Any]] = {}
"""Library op -> what a call with real tensors runs: the implementation, or a kernel's launcher."""

LAUNCHES: dict[Any, Callable[..., bool]] = {}
"""Library op -> whether a call launches a Triton kernel, of ops that launch them themselves."""

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    """Whether Triton is installed (found, not imported)."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether Triton kernels run through its interpreter, on CPU tensors (tests do)."""
    return _INTERPRETING


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether the Triton implementation serves an op's floating-point inputs; None is skipped.

    True when all are on one GPU (or any device under the interpreter), Triton is installed, and
    no dtype is fp64 (fp64 exists for gradient checks and runs in plain PyTorch).
    """
    device = None
    for t in tensors:
        if t is None:
            continue
        if device is None:
            if not (t.is_cuda or _INTERPRETING) or not has_triton():
                return False
            device = t.device
        elif t.device != device:
            return False
        if t.dtype is torch.float64:
            return False
    return device is not None


def use_triton_dot(*tensors: Tensor | None) -> bool:
    """``use_triton``, of kernels that multiply tiles: False on GPUs where libraries are to do it.

    The first tensor is not None.
    """
    return use_triton(*tensors) and gpu_of(tensors[0]).multiplies_tiles  # type: ignore[arg-type]


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up: Triton's function of the name costs a microsecond for each call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``, which is positive."""
    return 1 << (n - 1).bit_length()


FP_FUSION = True
"""Whether kernels multiply and add with one rounding, as PyTorch's CUDA kernels do.

Passed at each launch: Triton's default changes from 3.9 to 3.10.
"""


@dataclass(frozen=True)
class Gpu:
    """What configurations of kernels depend on."""

    generation: int  # the first number of the compute capability
    shared: int  # bytes of shared memory that one block of threads may have
    hip: bool = False  # whether it is one of AMD's
    multiprocessors: int = 2

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether tensor cores take their operands from shared memory."""
        # Those of Hopper and of Blackwell's data-centre cards do. Others take them from registers,
        # of which larger tiles then need more than there are.
        return self.generation in (9, 10) and not self.hip

    @property
    def multiplies_tiles(self) -> bool:
        """Whether kernels may multiply tiles (``tl.dot``)."""
        # Before Ampere (a T4 is 7.5) Triton makes scalar code of products, in any dtype: a tenth of
        # the speed of libraries, and attention takes more than twenty minutes to compile.
        return self.generation >= 8 or self.hip


_ELSEWHERE = Gpu(9, 227 << 10)
"""For tensors that are on no GPU: in Triton's interpreter, or fake ones."""


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a tensor is on."""
    return _gpu(tensor.get_device()) if tensor.is_cuda else _ELSEWHERE


@functools.cache
def _gpu(index: int) -> Gpu:
    if not torch.cuda.is_available():  # fake tensors
        return _ELSEWHERE
    properties = torch.cuda.get_device_properties(index)
    shared = (
        getattr(properties, "shared_memory_per_block_optin", 0)
        or properties.shared_memory_per_block
    )
    hip = torch.version.hip is not None
    return Gpu(properties.major, shared, hip, properties.multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """How Triton multiplies tiles of ``dtype``: ``"tf32"`` or ``"ieee"``, as PyTorch's products."""
    # ``torch.backends.cuda.matmul.allow_tf32`` says the same, but raises where the process has set
    # ``fp32_precision``, which is what transformers' ``TrainingArguments(tf32=True)`` sets.
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def without_base(t: Tensor) -> Tensor:
    """``t``, but no view of another tensor: a model may write into what an op returns."""
    # Autograd refuses that for a view that was made where it was not watching.
    return t.new_empty(0).set_(t) if t._is_view() else t  # type: ignore[call-overload]


def library_op(
    schema: str,
    implementation: Callable[..., Any] | str,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    temporary: Callable[..., int] | None = None,
    launches: Callable[..., bool] | None = None,
    plain: Callable[..., Any] | None = None,
    libraries: Sequence[Implementation] = (),
    inputs: Callable[..., tuple[Any, ...]] = drawn,
) -> Callable[..., Any]:
    """Define ``fusewright::NAME``, an opaque op without an autograd rule.

    Args:
        schema: ``"rms_norm_forward(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)"``.
            Outputs must be in fresh memory and no input may be mutated.
        implementation: a function of ATen calls for any device; or, of a Triton kernel,
            ``"room.OP:function"`` in ``kernels/room/OP_triton.py``, imported at the first real
            call.
        fake: same signature; returns outputs of the right shape, dtype and strides
            (``torch.empty`` and friends), for tracing.
        flops: same signature, defaults included; the floating-point operations of a call, as
            ``FlopCounterMode``, ``Op.cost`` and the memory planner count them. Without it they
            count none, which is right for an op without matrix products.
        temporary: same signature; the bytes that a call holds only while it runs.
        launches: same signature; whether a function that is given as ``implementation`` launches
            Triton kernels itself, not by way of other library ops.
        plain: same signature and results; computes calls whose kernel fails (``fallback.py``).
        libraries: other implementations of a kernel that has a plain form (``choice.py``).
        inputs: makes arguments on which they are measured, from those of a call and a generator.

    Returns:
        The callable op (``torch.ops.fusewright.NAME.default``).

    Raises:
        RuntimeError: NAME is defined already, in this process.
    """
    name = schema.split("(", 1)[0]
    if isinstance(implementation, str):
        run = _triton(implementation)
    else:
        run = implementation if launches is None else on_device(implementation)
    if plain is not None:
        plain = _like_launched(plain, fake)
        if libraries:
            others = tuple(map(_as_a_kernel, libraries))
            declared = functools.partial(_declared, fake)
            run = CandidateOp(name, run, plain, others, inputs, declared).__call__
        else:
            run = with_plain_form(name, run, plain)
    # 2026-11-24: torch.library is not typed
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fusewright::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.fusewright, name)
    op: Callable[..., Any] = packet.default
    RUNS[op] = run
    if isinstance(implementation, str):
        LAUNCHES[op] = lambda *args: True
    else:
        IMPLEMENTATIONS[op] = implementation
    if launches is not None:
        LAUNCHES[op] = launches
    if flops is not None:
        formula = flops
        register_flop_formula(packet, get_raw=True)(lambda *a, out_val=None, **k: formula(*a, **k))
    if temporary is not None:
        TEMPORARY_BYTES[op] = temporary
    return op


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the device of its first tensor as the current one."""

    # Triton launches on the current device, whatever device its tensors are on.
    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        tensor = args[0] if isinstance(args[0], Tensor) else next(_tensors(args))
        if not tensor.is_cuda:
            return function(*args)
        device = tensor.device
        if device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return guarded


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _triton(launcher: str) -> Callable[..., Any]:
    """The function that ``launcher`` names, which is looked up at the first call."""
    module_name, function_name = launcher.split(":")
    launch: Callable[..., Any] | None = None

    def implementation(*args: Any) -> Any:
        nonlocal launch
        if launch is None:
            module = importlib.import_module(f".{module_name}_triton", __package__)
            launch = on_device(getattr(module, function_name))
        return _fresh(launch(*args))

    return implementation


def _fresh(result: Any) -> Any:
    if isinstance(result, Tensor):
        return without_base(result) if result._is_view() else result
    return type(result)([without_base(t) for t in result])


def _as_a_kernel(candidate: Implementation) -> Implementation:
    def run(*args: Any) -> Any:
        device = next(_tensors(args)).device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            with _without_modes(device):
                return _fresh(candidate.run(*args))
        return _fresh(candidate.run(*args))

    return replace(candidate, run=run)


@contextlib.contextmanager
def _without_modes(device: str) -> Iterator[None]:
    # a kernel knows nothing of autograd and autocast
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _like_launched(plain: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    # A compiler has planned for results as ``fake`` declares them. What ``fake`` makes empty,
    # ``plain`` may return as None.
    def run(*args: Any) -> Any:
        declared = _declared(fake, *args)
        device = next(_tensors(args)).device
        with _without_modes(device.type):
            result = plain(*args)
        if isinstance(declared, Tensor):
            return _like(result, declared, device)
        pairs = zip(result, declared, strict=True)
        return type(declared)([_like(t, as_declared, device) for t, as_declared in pairs])

    return run


def _declared(fake: Callable[..., Any], *args: Any) -> Any:
    return fake(*tree_map_only(Tensor, _on_meta, args))


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _like(t: Tensor | None, declared: Tensor, device: torch.device) -> Tensor:
    if t is None:  # not needed
        return torch.empty_like(declared, device=device)
    if t.dtype is declared.dtype and t.stride() == declared.stride():
        return without_base(t)
    result = torch.empty_strided(
        declared.shape, declared.stride(), dtype=declared.dtype, device=device
    )
    return result.copy_(t)
