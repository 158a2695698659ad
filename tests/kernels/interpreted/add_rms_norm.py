"""The residual add fused into RMSNorm's Triton kernels, against the reference."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.library import opcheck

from fusewright.kernels.norms import add_rms_norm as op
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _parity(*given: Tensor, offset: float = 0.0, rounding: str = "inner") -> None:
    def bind(fn):
        return lambda x, r, w=None: fn(x, r, w, 1e-5, offset, rounding)

    assert_parity(bind(op.add_rms_norm), bind(op.reference), *given)


def check_parity() -> None:
    torch.manual_seed(0)
    variants = itertools.cycle([(0.0, "inner"), (1.0, "outer"), (1.0, "inner")])
    for x_dtype, r_dtype, w_dtype in itertools.product(DTYPES, DTYPES, DTYPES):
        offset, rounding = next(variants)
        x = torch.randn(3, 5, 123, dtype=x_dtype, requires_grad=True)
        r = torch.randn(3, 5, 123, dtype=r_dtype, requires_grad=True)
        w = torch.randn(123, dtype=w_dtype, requires_grad=True)
        _parity(x, r, w, offset=offset, rounding=rounding)


def check_strides_and_frozen() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 96)[..., :48].transpose(1, 2)
    r = torch.randn(3, 4, 5, 48, requires_grad=True)
    w = torch.randn(48)
    _parity(x, r, w)
    _parity(x.requires_grad_(), r, w, offset=1.0, rounding="outer")
    _parity(x, r)
    _parity(torch.randn(9, 48), torch.randn(9, 48), w.requires_grad_())
    empty = torch.randn(0, 48, requires_grad=True)
    total, y = op.add_rms_norm(empty, empty.detach(), w, 1e-5)
    (total.sum() + y.sum()).backward()
    assert empty.grad.shape == (0, 48)


def check_the_op_registers_well() -> None:
    x, r, w = torch.randn(3, 4, 24), torch.randn(3, 4, 24), torch.randn(24)
    for given in ((x, r, w), (x.bfloat16(), r, None), (x.transpose(0, 1), r.transpose(0, 1), w)):
        opcheck(op._forward_op, (*given, 1e-5, 1.0, True))
        opcheck(op._forward_op, (*given, 1e-5, 0.0, False))


if __name__ == "__main__":
    run(check_parity, check_strides_and_frozen, check_the_op_registers_well)
