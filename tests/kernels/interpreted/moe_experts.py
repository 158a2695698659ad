"""The routed experts' Triton kernels under the interpreter."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fusewright.kernels.mlp.glu import glu_packed
from fusewright.kernels.moe import moe_experts as ops
from fusewright.kernels.moe.moe_experts import OP, Update, moe_experts
from fusewright.kernels.tolerance import exceeded
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity


def _routing(tokens: int, experts: int, active: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:active] for _ in range(tokens)])


def _inputs(tokens: int, hidden: int, inner: int, experts: int, active: int) -> list[Tensor]:
    shapes = ((tokens, hidden), (tokens, active), (experts, 2 * inner, hidden),
              (experts, hidden, inner), (experts, 2 * inner), (experts, hidden))  # fmt: skip
    return [torch.randn(s) / (s[-1] ** 0.5 if len(s) == 3 else 1) for s in shapes]


def check_parity() -> None:
    torch.manual_seed(0)
    for tokens, hidden, inner, experts, active in ((37, 20, 36, 5, 2), (70, 136, 17, 2, 1)):
        index = _routing(tokens, experts - 1 or 1, min(active, experts - 1))
        plain = _inputs(tokens, hidden, inner, experts, index.shape[1])
        shapes = ((experts, 5, hidden), (2 * inner, 5, experts), (experts, 5, inner),
                  (hidden, 5, experts))  # fmt: skip
        factors = [torch.randn(s) * 0.2 for s in shapes]
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        # with an update, each kernel runs without one, too: the other shape tries the op that way
        given = (plain, plain + factors) if experts == 5 else (plain + factors,)
        for inputs, dtype in itertools.product(given, dtypes):
            cast = [t.detach().to(dtype).requires_grad_() for t in inputs]

            def call(op, x, w, up, down, b, c, *factors, index=index):
                act = lambda u: glu_packed(u, "silu") if op is moe_experts else _act(u)  # noqa: E731
                updates = [
                    Update(f.mT, g.permute(2, 1, 0), 0.7)
                    for f, g in zip(factors[::2], factors[1::2], strict=True)
                ]
                pair = up.transpose(1, 2), down.transpose(1, 2)
                return op(x, index, w, *pair, act, b, c, *updates)

            assert_parity(
                lambda *t, call=call: call(moe_experts, *t),
                lambda *t, call=call: call(OP.reference, *t),
                *cast,
            )


def _act(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def check_many_rows_use_the_large_tiles() -> None:
    a, weight = torch.randn(300, 40), torch.randn(2, 40, 150)
    offsets = torch.tensor([297, 300], dtype=torch.int32)
    ours = ops.grouped_mm(a, None, weight, offsets, None)
    torch.testing.assert_close(ours, torch.cat((a[:297] @ weight[0], a[297:] @ weight[1])))


def check_bf16_sums_and_empty_inputs() -> None:
    y, where = torch.randn(24, 100).bfloat16(), torch.randperm(24)
    weights = torch.rand(24)
    exact = (y[where].double() * weights.double()[:, None]).view(8, 3, 100).sum(1)
    # eager at its best: exact, and rounded once
    problem = exceeded(ops.combine(y, where, weights, 3), exact.bfloat16(), exact)
    assert problem is None, problem
    empty = torch.zeros(0, dtype=torch.int64)
    offsets = torch.zeros(4, dtype=torch.int32)
    none = ops.grouped_mm(torch.randn(5, 8), empty, torch.randn(4, 8, 6), offsets, None)
    assert none.shape == (0, 6)
    like = torch.randn(4, 8, 6)
    assert not ops.grouped_outer(torch.randn(0, 8), None, torch.randn(0, 6), offsets, like).any()
    assert ops.combine(none, empty, None, 2).shape == (0, 6)


if __name__ == "__main__":
    run(check_parity, check_many_rows_use_the_large_tiles, check_bf16_sums_and_empty_inputs)
