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

import functools
import time
from collections.abc import Callable
from inspect import ismodule
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.launch import interpreting

if interpreting():
    from triton.runtime import interpreter

    from tests.kernels.interpreted import _bf16

    _bf16.correct()


def _once_per_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the functions that a kernel calls find the language as the kernel has patched it.

    Each call of one goes through all names of ``triton.language`` again, to find that they are
    patched: a third of the time, or more, of kernels that are made of small functions.
    """
    patched: set[str] = set()

    @functools.wraps(patch)
    def patch_what_is_left(fn: Any) -> Any:
        modules = {getattr(v, "__name__", "") for v in fn.__globals__.values() if ismodule(v)}
        modules &= {"triton.language", "triton.language.core"}
        if modules and modules <= patched:
            return None  # nobody looks at it: only what a kernel itself has patched is restored
        is_kernel, scope = not patched, patch(fn)
        patched.update(modules)
        if is_kernel:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    return patch_what_is_left


if interpreting():
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)


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
