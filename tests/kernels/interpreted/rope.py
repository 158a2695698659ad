"""The rotary embedding's Triton kernel under the interpreter."""

from __future__ import annotations

import itertools

import torch

from fusewright.kernels.attention import rope as module
from fusewright.kernels.attention.rope import LAYOUTS, OP, rope
from tests.kernels.util import assert_parity

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def main() -> None:
    checks = 0
    torch.manual_seed(0)
    dtypes = ((FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32))
    # (batch, query heads, key heads, positions, features), features that rotate
    sizes = (((2, 5, 2, 3, 12), 12), ((1, 33, 1, 2, 20), 6), ((1, 2, 2, 3, 66), 64))
    for (dtype, table), (size, width), layout in itertools.product(dtypes, sizes, LAYOUTS):
        batch, heads, kv, time, dim = size
        q = torch.randn(batch, time, heads, dim).to(dtype).transpose(1, 2)
        k = torch.randn(batch, kv, time, 2 * dim).to(dtype)[..., ::2]  # no adjacent features
        cos, sin = (torch.randn(batch, 1, time, width).to(table) for _ in range(2))
        assert module._fits_kernel((q, k), cos, sin)
        for needs in ((True, True), (True, False), (False, True)):
            assert_parity(
                lambda q, k, c, s, w=width, i=layout: rope((q, k), c, s, w, i),
                lambda q, k, c, s, w=width, i=layout: OP.reference((q, k), c, s, w, i),
                q.detach().requires_grad_(needs[0]),
                k.detach().requires_grad_(needs[1]),
                cos,
                sin,
            )
            checks += 1
    # other ranks, the order (B, T, H, D), three tensors, tables shared by samples or expanded
    x, y = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    for tensors, shape in (
        ((x, y, x + 1), (5, 1, 8)),
        ((x.transpose(1, 2),), (1, 5, 8)),
        ((x[0].transpose(0, 1),), (5, 8)),
        ((x[0, 0], x[1]), (1, 8)),
        ((x[:0],), (1, 5, 1, 8)),
    ):
        cos, sin = torch.randn(shape), torch.randn(shape)
        assert module._fits_kernel(tensors, cos, sin)
        assert_parity(
            lambda c, s, *t: rope(t, c, s, 8),
            lambda c, s, *t: OP.reference(t, c, s, 8),
            cos,
            sin,
            *(t.detach().requires_grad_() for t in tensors),
        )
        checks += 1
    cos = torch.randn(1, 5, 1, 8).expand(2, 5, 3, 8)
    assert module._fits_kernel((x,), cos, cos)
    torch.testing.assert_close(rope((x,), cos, cos, 8), OP.reference((x,), cos, cos, 8))
    per_head = torch.randn(2, 5, 3, 8)
    assert OP.unsupported((x,), per_head, per_head, 8)
    torch.testing.assert_close(
        rope((x,), per_head, per_head, 8), OP.reference((x,), per_head, per_head, 8)
    )
    print(f"{checks + 2} checks passed")


if __name__ == "__main__":
    main()
