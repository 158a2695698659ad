"""RMSNorm inside a Triton matmul, and the way around it, against the reference."""

from __future__ import annotations

import torch
from torch.library import opcheck

from fusewright.kernels.norms import rms_norm_linear as op
from fusewright.kernels.norms.rms_norm_linear_triton import launch_fused
from fusewright.kernels.tolerance import exceeded
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity


def check_the_fused_kernel() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape, offset, rounding in (
            ((5, 123), 0.0, "inner"),
            ((2, 25, 252), 0.25, "outer"),
            ((150, 96), 1.0, "inner"),
        ):
            for weighted in (True, False):
                formula = 1e-5, offset, rounding
                # the largest error of few elements is a matter of luck: as in verify.py
                made = [_compared(shape, dtype, formula, weighted)]
                if any(exceeded(*triple) for triple in made[0]):
                    made += [_compared(shape, dtype, formula, weighted) for _ in range(15)]
                for results in zip(*made, strict=True):
                    ours, eager, exact = (torch.stack(t) for t in zip(*results, strict=True))
                    problem = exceeded(ours, eager, exact)
                    assert problem is None, problem


def _compared(shape, dtype, formula, weighted):
    """(ours, eager's, exact) of each output."""
    x = torch.randn(shape, dtype=dtype)
    g = torch.randn(shape[-1], dtype=dtype) if weighted else None
    weights = [torch.randn(n, shape[-1], dtype=dtype) / 16 for n in (130, 70)]
    biases = [torch.randn(130, dtype=dtype), None]
    eps, offset, rounding = formula
    *ours, rstd = launch_fused(x, g, eps, offset, rounding == "outer", weights, biases)
    eager = op.reference(x, g, *formula, weights, biases)
    exact = op.reference(
        x.double(),
        None if g is None else g.double(),
        *formula,
        [w.double() for w in weights],
        [None if b is None else b.double() for b in biases],
    )
    mean = x.double().square().mean(-1, keepdim=True)
    torch.testing.assert_close(rstd, (mean + eps).rsqrt().float())
    return list(zip(ours, eager, exact, strict=True))


def check_parity() -> None:
    torch.manual_seed(0)

    def bind(fn):
        return lambda x, g, v, w, b: fn(x, g, 1e-5, 1.0, "outer", [v, w], [b, None])

    given = [torch.randn(s, requires_grad=True) for s in ((2, 7, 123), 123, (33, 123), (8, 123))]
    assert_parity(bind(op.rms_norm_linear), bind(op.reference), *given, torch.randn(33))


def check_the_op_registers_well() -> None:
    x, g, w = torch.randn(2, 3, 24), torch.randn(24), torch.randn(8, 24)
    opcheck(op._forward_op, (x, g, 1e-5, 0.0, False, [w, w.clone()], [torch.randn(8), None]))
    opcheck(op._forward_op, (x.transpose(0, 1), None, 1e-5, 0.0, True, [w], [None]))
    opcheck(op._forward_op, (x, g, 1e-5, 0.0, True, [w.bfloat16()], [None]))


if __name__ == "__main__":
    run(check_the_fused_kernel, check_parity, check_the_op_registers_well)
