"""LayerNorm's Triton kernels against the reference."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.library import opcheck

from fusewright.kernels.norms import layer_norm as op
from tests.kernels.interpreted import assert_traced_whole, run
from tests.kernels.util import assert_parity, strided_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _parity(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    def bind(fn):
        def call(x, *given):
            w, b = (
                (given[0] if weight is not None else None),
                (given[-1] if bias is not None else None),
            )
            return fn(x, w, b, 1e-5)

        return call

    assert_parity(
        bind(op.layer_norm), bind(op.reference), x, *(t for t in (weight, bias) if t is not None)
    )


def check_parity() -> None:
    torch.manual_seed(0)
    variants = itertools.cycle([(True, True), (True, False), (False, False), (False, True)])
    shapes = ((7, 123), (2, 3, 252), (1, 1, 1, 16), (40, 64), (3, 1500), (80, 40))
    for shape, x_dtype, w_dtype in itertools.product(shapes, DTYPES, DTYPES):
        x = torch.randn(shape, dtype=x_dtype, requires_grad=True)
        w, b = (
            torch.randn(shape[-1], dtype=w_dtype, requires_grad=True) if wanted else None
            for wanted in next(variants)
        )
        _parity(x, w, b)
    for heads in (1, 2):  # parameters by blocks of columns
        x, w, b = (
            torch.randn(*s, 9001, requires_grad=True) for s in ((9, heads), (heads,), (heads,))
        )
        _parity(x, w, b)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        x, w, b = (
            torch.randn(*s, requires_grad=n)
            for s, n in zip(((9, 123), (123,), (123,)), needs, strict=True)
        )
        _parity(x, w, b)


def check_heads() -> None:
    torch.manual_seed(0)
    for heads, dim, dtype in zip((1, 3, 8), (300, 48, 16), DTYPES, strict=True):
        x = torch.randn(2, 5, heads, dim, dtype=dtype, requires_grad=True)
        w = torch.randn(heads, dim, dtype=dtype, requires_grad=True)
        b = torch.randn(heads, dim, dtype=dtype, requires_grad=True)
        _parity(x, w, b)
        _parity(x, w.detach(), None)
    x = torch.randn(2, 3, 5, 48).transpose(1, 2)
    _parity(x.requires_grad_(), torch.randn(3, 48, requires_grad=True), None)


def check_strides() -> None:
    torch.manual_seed(0)
    w, b = torch.randn(48, requires_grad=True), torch.randn(48, requires_grad=True)
    for x in strided_rows():
        _parity(x.requires_grad_(), w, b)
        with torch.no_grad():
            ours, eager = op.layer_norm(x, w, b, 1e-5), op.reference(x, w, b, 1e-5)
        assert ours.stride() == eager.stride()
    _parity(torch.randn(5, 48, requires_grad=True), torch.randn(96)[::2], None)
    y = op.layer_norm(torch.randn(0, 48, requires_grad=True), w, b, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 48)
    assert torch.equal(w.grad, torch.zeros(48))
    assert torch.equal(b.grad, torch.zeros(48))


def check_the_ops_register_well() -> None:
    x, w = torch.randn(3, 4, 24), torch.randn(24)
    heads = torch.randn(4, 24)
    for given in ((x, w, w), (x.bfloat16(), w, None), (x.transpose(0, 1), w, w), (x, None, None),
                  (x, heads, heads)):  # fmt: skip
        opcheck(op._forward_op, (*given, 1e-5))
        y, mean, rstd = op._forward_op(*given, 1e-5)
        for need_x, need_weight, need_bias in ((True, True, True), (True, False, False),
                                               (False, True, False)):  # fmt: skip
            needs = (need_x, need_weight and given[1] is not None,
                     need_bias and given[2] is not None)  # fmt: skip
            opcheck(op._backward_op, (torch.randn_like(y), *given, mean, rstd, *needs))


def check_tracing_keeps_the_ops_whole() -> None:
    assert_traced_whole(
        lambda x, w: op.layer_norm(x, w, None, 1e-5), op._forward_op, op._backward_op
    )


if __name__ == "__main__":
    run(
        check_parity,
        check_heads,
        check_strides,
        check_the_ops_register_well,
        check_tracing_keeps_the_ops_whole,
    )
