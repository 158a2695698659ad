"""The gated linear units' Triton kernels under the interpreter."""

from __future__ import annotations

import itertools

import torch

from fusewright.kernels.mlp.glu import ACTIVATIONS, OP, OP_PACKED, glu, glu_packed
from tests.kernels.util import assert_parity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    checks = 0
    torch.manual_seed(0)
    for act, dtype in itertools.product(ACTIVATIONS, DTYPES):
        wide = torch.randn(2, 3, 3 * 123).to(dtype)
        a, b, t = wide[..., :123], wide[..., 123:246], torch.randn(2, 123, 3).to(dtype)
        layouts = [
            (a.contiguous(), b.contiguous(), True, True),  # one long row
            (a, b, True, True),  # slices of a wider tensor
            (a, t.transpose(1, 2), True, False),  # no adjacent elements
            (torch.randn(2, 1100).to(dtype)[:, :1030], torch.randn(2, 1030).to(dtype), False, True),
        ]
        for gate, up, need_gate, need_up in layouts:
            assert_parity(
                lambda g, u, act=act: glu(g, u, act),
                lambda g, u, act=act: OP.reference(g, u, act),
                gate.detach().requires_grad_(need_gate),
                up.detach().requires_grad_(need_up),
            )
            checks += 1
        for packed, first in ((wide[..., :246], True), (wide[..., 1:].contiguous(), False)):
            assert_parity(
                lambda x, act=act, first=first: glu_packed(x, act, first),
                lambda x, act=act, first=first: OP_PACKED.reference(x, act, first),
                packed.detach().requires_grad_(),
            )
            checks += 1
    empty = torch.randn(0, 4, requires_grad=True)
    glu(empty, empty, "silu").sum().backward()
    print(f"{checks} checks passed")


if __name__ == "__main__":
    main()
