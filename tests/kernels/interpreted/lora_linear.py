"""The rank update's Triton kernel under the interpreter, alone and inside ``lora_linear``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

import torch

from fusewright.kernels import launch
from fusewright.kernels.launch import Gpu
from fusewright.kernels.linear import lora_linear_triton
from fusewright.kernels.linear.lora_linear_triton import (
    _WIDE_TILES,
    _WIDE_TILES_IN_REGISTERS,
    _wide_config,
    rank_update,
    wide_product,
)
from fusewright.kernels.tolerance import exceeded
from tests.kernels.by_parts import LORA
from tests.kernels.util import assert_parity

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = ((FP32, FP32), (FP16, FP16), (FP16, FP32), (BF16, BF16), (BF16, FP32))


def check_kernel() -> int:
    """The kernel against fp64: tile edges, ranks over one block, strides, mixed dtypes."""
    checks = 0
    for (n, m), rank, (dtype, factor) in itertools.product(
        ((9, 5), (64, 128), (65, 257)), (1, 16, 100), DTYPES
    ):
        wide = torch.randn(n, m + 3).to(dtype)
        left, right = torch.randn(rank, n).t().to(factor), torch.randn(m, rank).to(factor).t()
        for base in (wide[:, :m], wide[:, :m].contiguous(), torch.randn(m, n).to(dtype).t()):
            before = base.clone()
            out = rank_update(base, left, right)
            rounded = (left.to(dtype).double(), right.to(dtype).double())
            exact = base.double() + rounded[0] @ rounded[1]
            eager = torch.addmm(base, left.to(dtype), right.to(dtype))
            problem = exceeded(out, eager, exact)
            assert problem is None, (n, m, rank, dtype, factor, problem)
            assert torch.equal(base, before), "the base was written to"
            checks += 1
    return checks


CARDS = {"hopper": Gpu(9, 227 << 10), "ada": Gpu(8, 99 << 10)}
"""Whose tensor cores take their operands from shared memory, or from registers."""


@contextlib.contextmanager
def _on(gpu: Gpu, programs: int) -> Iterator[None]:
    """Choose tiles as on a card for which so many programs are enough."""
    with (
        mock.patch.object(lora_linear_triton, "_PROGRAMS", programs),
        mock.patch.object(launch, "_ELSEWHERE", gpu),
    ):
        _wide_config.cache_clear()
        yield
    _wide_config.cache_clear()


def check_wide_product() -> int:
    """Each tile against fp64: edges, strides, shares of sums, and fp32 results of bf16 rows."""
    checks = 0
    sizes = ((9, 40, 5), (65, 33, 17), (17, 70, 100), (130, 200, 48), (20, 0, 3), (64, 1300, 16))
    for card, programs in (("hopper", 1), ("hopper", 256), ("ada", 7)):
        tiles, shares, gpu = set(), set(), CARDS[card]
        with _on(gpu, programs):
            for (m, k, r), by_columns in itertools.product(sizes, (False, True)):
                wide = (torch.randn(k, m).t() if by_columns else torch.randn(m, k)).bfloat16()
                factor, scale = torch.randn(k, r + 3), 0.37 if by_columns else 1.0
                for narrow in (factor[:, :r], factor[:, :r].t().contiguous().t()):
                    eager = wide.float() @ narrow * scale
                    exact = wide.double() @ narrow.double() * scale
                    grid, share, config = _wide_config(m, r, k, gpu)
                    tiles.add((config["BLOCK_M"], config["BLOCK_R"]))
                    shares.add(grid[1])
                    assert share * grid[1] >= k > share * (grid[1] - 1) or k == 0
                    made = wide_product(wide, narrow, scale, False)
                    problem = exceeded(made, eager, exact)
                    assert problem is None, (card, programs, m, k, r, by_columns, problem)
                    turned = wide_product(wide, narrow, scale, True)
                    assert turned.is_contiguous()
                    assert torch.equal(turned.t(), made)
                    checks += 1
        known = _WIDE_TILES if card == "hopper" else _WIDE_TILES_IN_REGISTERS
        assert tiles == set(known), "a tile goes untested"
        assert (max(shares) > 1) == (programs > 1)
    assert wide_product(torch.randn(0, 4).bfloat16(), torch.randn(4, 2), 1.0, True).shape == (2, 0)
    return checks


def check_op() -> int:
    checks = 0
    for (dtype, adapter), own, rank in itertools.product(DTYPES, (False, True), (3, 70)):
        x, z = torch.randn(2, 33, 40).to(dtype), torch.randn(2, 33, 40).to(adapter)
        w, b = (torch.randn(131, 40) / 6).to(dtype), torch.randn(131).to(dtype)
        a = (torch.randn(rank, 40) / 6).to(adapter)
        lora_b = (torch.randn(131, rank) / 4).to(adapter)
        inputs = [t.requires_grad_() for t in (x, w, b, a, lora_b, *([z] if own else []))]
        assert_parity(
            lambda *t: LORA.call(*t[:5], 2.0, *t[5:]),
            lambda *t: LORA.reference(*t[:5], 2.0, *t[5:]),
            *inputs,
        )
        checks += 1
    return checks


def main() -> None:
    torch.manual_seed(0)
    checks = check_kernel() + check_wide_product() + check_op()
    empty = torch.randn(0, 8)
    assert rank_update(empty, torch.randn(0, 2), torch.randn(2, 8)).shape == (0, 8)
    print(f"{checks + 1} checks passed")


if __name__ == "__main__":
    main()
