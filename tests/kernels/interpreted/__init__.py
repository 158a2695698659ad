"""Checks of the Triton kernels under Triton's interpreter, one module per op.

``tests/kernels/test_triton_interpreter.py`` runs each module here in a process of its own, because
Triton reads ``TRITON_INTERPRET`` when a kernel is defined. A module looks like this::

    from tests.kernels.interpreted import run

    def check_forward() -> None:
        assert_parity(...)

    if __name__ == "__main__":
        run(check_forward)

The interpreter is right in fp32 and fp16; ``_bf16`` corrects what it does in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fusewright.kernels.launch import interpreting

if interpreting():
    from tests.kernels.interpreted import _bf16

    _bf16.correct()


def run(*checks: Callable[[], None]) -> None:
    """Run every check; an assertion ends the process. Prints the line that the test looks for."""
    assert checks
    assert interpreting(), "set TRITON_INTERPRET=1 before Python starts"
    for check in checks:
        start = time.perf_counter()
        check()
        print(f"{check.__name__} {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(checks)} checks passed")


def assert_traced_whole(
    norm: Callable[[Tensor, Tensor], Tensor], *ops: Callable[..., object]
) -> None:
    """Trace a step of ``norm(x, w)``: each of ``ops`` is one node, and the numbers are eager's."""

    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(x, w).square().sum(), (x, w))

    x, w = torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    traced = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode="fake")(x, w)
    targets = [n.target for n in traced.graph.nodes]
    assert [targets.count(op) for op in ops] == [1] * len(ops)
    for ours, eager in zip(traced(x, w), step(x, w), strict=True):
        assert torch.equal(ours, eager)
