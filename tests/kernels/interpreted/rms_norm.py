"""RMSNorm's Triton kernels against the reference."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.library import opcheck

from fusewright.kernels.norms import rms_norm as op
from tests.kernels.interpreted import assert_traced_whole, run
from tests.kernels.util import assert_parity, strided_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _parity(x: Tensor, weight: Tensor | None, offset: float, rounding: str) -> None:
    given = [x] if weight is None else [x, weight]

    def bind(fn):
        return lambda x, w=None: fn(x, w, 1e-5, offset, rounding)

    assert_parity(bind(op.rms_norm), bind(op.reference), *given)


def check_parity() -> None:
    torch.manual_seed(0)
    variants = itertools.cycle([(0.0, "inner"), (1.0, "outer"), (1.0, "inner"), (0.0, "outer")])
    shapes = ((7, 123), (2, 3, 252), (1, 1, 1, 16), (40, 64), (3, 1500))
    for shape, x_dtype, w_dtype in itertools.product(shapes, DTYPES, DTYPES):
        offset, rounding = next(variants)
        x = torch.randn(shape, dtype=x_dtype, requires_grad=True)
        w = torch.randn(shape[-1], dtype=w_dtype, requires_grad=True)
        _parity(x, w, offset, rounding)
    for x_needs, w_needs in ((True, False), (False, True)):
        x = torch.randn(9, 123, requires_grad=x_needs)
        w = torch.randn(123, requires_grad=w_needs)
        _parity(x, w, 0.0, "inner")
    wide, w = torch.randn(9, 9001, requires_grad=True), torch.randn(9001, requires_grad=True)
    _parity(wide, w, 1.0, "outer")  # dW by blocks of columns
    _parity(torch.randn(9, 123, dtype=torch.bfloat16, requires_grad=True), None, 0.0, "inner")
    _parity(torch.randn(9, 123, dtype=torch.float16, requires_grad=True), None, 0.25, "outer")


def check_strides() -> None:
    torch.manual_seed(0)
    w = torch.randn(48)
    for x in strided_rows():
        _parity(x.requires_grad_(), w.requires_grad_(), 1.0, "outer")
        with torch.no_grad():
            ours, eager = op.rms_norm(x, w, 1e-5), op.reference(x, w, 1e-5)
        assert ours.stride() == eager.stride()
    _parity(torch.randn(5, 48, requires_grad=True), torch.randn(96)[::2], 0.0, "inner")
    y = op.rms_norm(torch.randn(0, 48, requires_grad=True), w, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 48)
    assert torch.equal(w.grad, torch.zeros(48))


def check_the_ops_register_well() -> None:
    x, w = torch.randn(3, 4, 24), torch.randn(24)
    for given in ((x, w), (x.bfloat16(), w), (x.transpose(0, 1), w), (x, None)):
        for outer in (True, False):
            args = (*given, 1e-5, 1.0, outer)
            opcheck(op._forward_op, args)
            y, rstd = op._forward_op(*args)
            for extra, need_x, need_weight in (
                (None, True, True),
                (x, True, False),
                (x, False, True),
            ):
                need_weight = need_weight and given[1] is not None
                args = (torch.randn_like(y), *given, rstd, extra, 1.0, outer, need_x, need_weight)
                opcheck(op._backward_op, args)


def check_tracing_keeps_the_ops_whole() -> None:
    assert_traced_whole(lambda x, w: op.rms_norm(x, w, 1e-5), op._forward_op, op._backward_op)


if __name__ == "__main__":
    run(
        check_parity,
        check_strides,
        check_the_ops_register_well,
        check_tracing_keeps_the_ops_whole,
    )
