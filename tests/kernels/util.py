"""What every op test needs: the error budget over an op and its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusewright.budget import exceeded


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


def assert_parity(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
    seed: int = 0,
) -> None:
    """Hold ``ours`` to the error budget against ``reference``, forward and every gradient.

    Inputs keep their strides and ``requires_grad``; upstream gradients are random. Also checks
    that backward works twice over a retained graph with identical results, and that no input was
    written to.
    """
    before = [t.detach().clone() for t in inputs]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        probe = reference(*inputs)
    probe = probe if isinstance(probe, tuple) else (probe,)
    upstream = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
        for o in probe
    ]
    mine = _run(ours, inputs, upstream)
    eager = _run(reference, inputs, upstream)
    exact = _run(reference, inputs, upstream, torch.float64)
    for kind, a, b, c in zip(("output", "gradient"), mine, eager, exact, strict=True):
        assert len(a) == len(b) == len(c)
        for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            problem = exceeded(x, y, z)
            assert problem is None, f"{kind} {i}: {problem}"
    for t, old in zip(inputs, before, strict=True):
        assert torch.equal(t.detach(), old), "an input was written to"
