"""What every op test needs: the error budget over an op and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusewright.kernels.launch import has_triton, interpreting
from fusewright.kernels.op import Op
from fusewright.kernels.tolerance import EXCEEDS, exceeded
from fusewright.rewrite.sample_inputs import SUBNORMAL, draws


def _run(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of ``fn``; ``dtype`` casts the floating-point inputs first."""
    leaves = [t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype) for t in inputs]
    for leaf, t in zip(leaves, inputs, strict=True):
        leaf.requires_grad_(t.requires_grad)
    out = fn(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return outs, []
    live = [(o, u.to(o.dtype)) for o, u in zip(outs, upstream, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in live], wanted, [u for _, u in live], allow_unused=True, retain_graph=True
    )
    again = torch.autograd.grad(
        [o for o, _ in live], wanted, [u for _, u in live], allow_unused=True
    )
    for first, second in zip(grads, again, strict=True):  # a retained graph gives the same twice
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
    return outs, [
        g if g is not None else torch.zeros_like(t) for g, t in zip(grads, wanted, strict=True)
    ]


Fn = Callable[..., Tensor | tuple[Tensor, ...]]

needs_triton = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled"),
]


def assert_parity(ours: Fn, reference: Fn, *inputs: Tensor, seed: int = 0) -> None:
    """Hold ``ours`` to the error budget against ``reference``, forward and every gradient.

    The inputs of ``ours`` keep their strides and ``requires_grad``; upstream gradients are random.
    Also checks that backward works twice over a retained graph with identical results, and that no
    input was written to.
    """
    problem = _problem(ours, reference, [inputs], seed)
    assert problem is None, problem


def assert_parity_of_draws(ours: Fn, reference: Fn, draw: Callable[[], Sequence[Tensor]]) -> None:
    """``assert_parity`` where a result has few elements: their error is a matter of luck.

    What one draw finds outside the budget is judged by several together, as in ``verify.py``; by
    more than there, since each run of a test draws other shapes, and some have very few elements.
    """
    given = [draw()]
    problem = _problem(ours, reference, given, 0)
    for count in (*draws(given[0]), 256):
        if problem is None or EXCEEDS not in problem:
            break
        given += (draw() for _ in range(len(given), count))
        problem = _problem(ours, reference, given, 0)
    assert problem is None, problem


def bound(fn: Callable[..., Any], inputs: Sequence[Any], *options: Any) -> Callable[..., Any]:
    """``fn`` as a function of those inputs that are there."""

    def call(*given: Tensor) -> Any:
        rest = iter(given)
        return fn(*(None if t is None else next(rest) for t in inputs), *options)

    return call


def assert_parity_of(op: Op, inputs: Sequence[Any], *options: Any) -> None:
    """``assert_parity`` of an op that may be given None."""
    ours, reference = (bound(fn, inputs, *options) for fn in (op.call, op.reference))
    assert_parity(ours, reference, *(t for t in inputs if t is not None))


def assert_parity_over(op: Op, make: Callable[[], Sequence[Any]], *options: Any) -> None:
    """The same, where a gradient has few numbers: over draws."""
    like = make()
    ours, reference = (bound(fn, like, *options) for fn in (op.call, op.reference))
    assert_parity_of_draws(ours, reference, lambda: [t for t in make() if t is not None])


def strided_rows(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows of 48 features: sliced, with gaps, transposed, by columns, expanded."""
    base = torch.randn(3, 5, 4, 96, dtype=dtype)
    return [
        base[..., :48],
        base[..., ::2],
        base[..., 48:].transpose(1, 2),
        torch.randn(48, 10, dtype=dtype).t(),
        torch.randn(1, 48, dtype=dtype).expand(6, 48),
    ]


def _problem(ours: Fn, reference: Fn, given: Sequence[Sequence[Tensor]], seed: int) -> str | None:
    """What is outside the budget over all draws together, or None.

    In fp16, upstream gradients near zero are tried too: a rounding may not be multiplied there.
    """
    has_half = any(t.dtype is torch.float16 for t in given[0])
    for size in (1.0, SUBNORMAL.upstream) if has_half else (1.0,):
        made = [_compared(ours, reference, x, seed + i, size) for i, x in enumerate(given)]
        for kind, results in zip(("output", "gradient"), zip(*made, strict=True), strict=True):
            for i, triples in enumerate(zip(*results, strict=True)):
                x, y, z = (torch.stack(t) for t in zip(*triples, strict=True))
                problem = exceeded(x, y, z)
                if problem is not None:
                    return f"{kind} {i} (upstream gradients of {size:g}): {problem}"
    return None


def _compared(
    ours: Fn, reference: Fn, inputs: Sequence[Tensor], seed: int, size: float
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """(ours, eager, exact) of each output, and of each gradient.

    In fp64 the exact result is eager's own, whose roundings depend on strides: at a gate of 7
    PyTorch's ``gelu_backward`` is off by 18 units vectorized, and else by 5. So eager runs with
    contiguous inputs, which is the exact result, and with a stride of 2, which is eager's error.
    """
    before = [t.detach().clone() for t in inputs]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        probe = reference(*inputs)
    probe = probe if isinstance(probe, tuple) else (probe,)
    upstream = [
        (size * torch.randn(o.shape, generator=generator, dtype=torch.float64)).to(
            o.device, o.dtype
        )
        for o in probe
    ]
    runs = (
        _run(ours, inputs, upstream),
        _run(reference, [_with_last_stride(t, 2) for t in inputs], upstream),
        _run(reference, [_with_last_stride(t, 1) for t in inputs], upstream, torch.float64),
    )
    for t, old in zip(inputs, before, strict=True):
        assert torch.equal(t.detach(), old), "an input was written to"
    outputs, gradients = (list(zip(*kind, strict=True)) for kind in zip(*runs, strict=True))
    return outputs, gradients


def _with_last_stride(t: Tensor, stride: int) -> Tensor:
    """``t`` with this stride of its last dimension, if it has fp64; 1 is for vectorized code."""
    if t.dtype is not torch.float64:
        return t
    return torch.stack([t.detach()] * stride, -1)[..., 0].requires_grad_(t.requires_grad)


class Watch(TorchDispatchMode):
    """Tells ``note`` of each operation that runs: it, its arguments, the tensors it returns."""

    def __init__(self, note: Callable[[Any, Any, list[Tensor]], object]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(func, args, [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What autograd keeps of what runs inside."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


class Stop(torch.autograd.Function):
    """The identity, without a gradient: it returns None, which is not the same as zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None
