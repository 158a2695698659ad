"""The 4-bit kernels under the interpreter: against plain PyTorch, and inside both ops."""

from __future__ import annotations

import itertools

import torch

from fusewright.kernels.linear.linear import quant_linear, quant_linear_reference
from fusewright.kernels.linear.quantized import dequantize, dequantize_reference
from tests.kernels.by_parts import LORA, MLP, QKV
from tests.kernels.quantized_weights import random_weight
from tests.kernels.test_quantized_blocks import separate, separate_mlp
from tests.kernels.util import assert_parity

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def check_dequantize() -> int:
    """Bit for bit: odd sizes, a last block that is cut off, more than one program.

    Blocks are of fewer bytes than a program has, or more, and one size is no power of two.
    """
    checks = 0
    cases = (
        *itertools.product(
            ((3, 7), (5, 64), (33, 70), (40, 192)), ("nf4", "fp4"), (64, 128), (False, True)
        ),
        *itertools.product(((33, 70), (61, 192)), ("nf4",), (96, 4096), (False, True)),
    )
    for shape, kind, blocksize, nested in cases:
        w = random_weight(shape, kind, blocksize, nested)
        for dtype in (F32, F16, BF16):
            made, right = dequantize(w, dtype), dequantize_reference(w, dtype)
            assert torch.equal(made, right), (shape, kind, dtype)
            checks += 1
    stored = random_weight((8, 64), "nf4", 64, True)
    packed, *rest = stored.tensors
    as_half = stored._replace(tensors=(packed.view(-1).view(F16).view(-1, 1), *rest))
    assert torch.equal(dequantize(as_half, F32), dequantize_reference(stored, F32))
    return checks + 1


def check_ops() -> int:
    """Forward and gradients through the ops, few rows and many, one dtype and two."""
    checks = 0
    for rows, shape, (dtype, adapter) in itertools.product(
        (3, 40), ((24, 64), (31, 65)), ((F32, F32), (F16, F16), (F16, F32), (BF16, F32))
    ):
        w = random_weight(shape, "nf4", 64, True)
        x = torch.randn(rows, shape[1]).to(dtype).requires_grad_()
        bias = torch.randn(shape[0]).to(dtype).requires_grad_()
        a = (torch.randn(4, shape[1]) / 8).to(adapter).requires_grad_()
        b = torch.randn(shape[0], 4).to(adapter).requires_grad_()
        assert_parity(
            lambda x, bias, w=w: quant_linear(x, w, bias),
            lambda x, bias, w=w: quant_linear_reference(x, w, bias),
            x, bias,
        )  # fmt: skip

        assert_parity(
            lambda x, bias, a, b, w=w: LORA.call(x, w, bias, a, b, 2.0),
            lambda x, bias, a, b, w=w: LORA.reference(x, w, bias, a, b, 2.0),
            x, bias, a, b,
        )  # fmt: skip
        checks += 2
    return checks


def _over(op, weights, *options):
    """``op`` as a function of x, the A's and the B's."""

    def call(x, *t):
        count = len(t) // 2
        none = [None] * count
        lists = (weights[:count], none, t[:count], t[count:], [2.0] * count, none)
        return op(x, *lists, *options)

    return call


def check_blocks() -> int:
    """Two linears on one input, and a gated MLP, in both ways of keeping.

    Where adapters are wider than the base, against the single ops, as in the tests on the CPU.
    """
    checks = 0
    for (dtype, adapter), (way, keep) in itertools.product(
        ((F32, F32), (F16, F16), (F16, F32), (BF16, BF16)), (("all", "gate_up"), ("input", "input"))
    ):
        weights = [random_weight((64, 64), "nf4", 64, True) for _ in range(3)]
        x = torch.randn(40, 64).to(dtype).requires_grad_()
        t = [torch.randn(4, 64) / 8 for _ in range(3)] + [torch.randn(64, 4) for _ in range(3)]
        t = [one.to(adapter).requires_grad_() for one in t]

        single = dtype is not adapter
        assert_parity(
            _over(QKV.call, weights, way),
            _over(separate if single else QKV.reference, weights),
            x, *t[:2], *t[3:5],
        )  # fmt: skip
        assert_parity(
            _over(MLP.call, weights, "silu", "two", keep),
            _over(separate_mlp if single else MLP.reference, weights, "silu", "two"),
            x, *t,
        )  # fmt: skip
        checks += 2
    return checks


def main() -> None:
    torch.manual_seed(0)
    print(f"{check_dequantize() + check_ops() + check_blocks()} checks passed")


if __name__ == "__main__":
    main()
