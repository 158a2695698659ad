"""A kernel that fails after others of its op have run: the plain form takes up what they kept."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fusewright.kernels import fallback
from tests.kernels.calls import CASES, sized
from tests.kernels.failing_launches import ERRORS, clean
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity_of_draws

LATER = {
    "rms_norm": "backward_kernel",
    "add_rms_norm": "backward_kernel",
    "rms_norm_linear": "backward_kernel",
    "layer_norm": "backward_kernel",
    "glu": "_backward_kernel",
    "glu_packed": "_backward_kernel",
    "mlp_block-input": "_backward_kernel",
    "moe_experts-bias": "_grouped_outer_kernel",
}
"""Call -> the kernel that its backward launches, after its forward has launched others."""


def check_backward() -> None:
    for name, kernel in LATER.items():
        _check(name, kernel, after=0)


def check_second_call() -> None:
    """In forward, of an op whose first call went well; in backward, of those that run in both."""
    _check("rms_norm", "forward_kernel", after=1)
    _check("glu", "_forward_kernel", after=1)
    _check("rope", "_rope_kernel", after=1)
    _check("linear_logprob-all", "rows_kernel", after=1)
    _check("lora_linear", "rank_update_kernel", after=1)


def _check(name: str, kernel: str, after: int) -> None:
    seeds = itertools.count()

    case = replace(CASES[name], sizes=sized(2, 7, 32), dtype=torch.float32)
    call = case.call()

    def draw() -> Sequence[Tensor]:
        return case.call(next(seeds)).tensors

    with clean(), _failing(kernel, after) as left, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_parity_of_draws(
                call.ours, call.reference, lambda: case.call(next(seeds)).tensors
            )
        assert len(fallback.FAILED) == 1, (name, fallback.FAILED)
    assert left == [-1], "a kernel that has failed was tried again"
    assert len([w for w in caught if "could not be compiled" in str(w.message)]) == 1, name


@contextmanager
def _failing(kernel: str, after: int) -> Iterator[list[int]]:
    """Let launches of ``kernel`` fail after that many; yields how many are left."""
    left = [after]
    run: Callable[..., Any] = InterpretedFunction.run

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__name__ != kernel:
            return run(self, *args, **kwargs)
        left[0] -= 1
        if left[0] >= 0:
            return run(self, *args, **kwargs)
        raise ERRORS["resources"]()

    with mock.patch.object(InterpretedFunction, "run", failing):
        yield left


if __name__ == "__main__":
    torch.manual_seed(0)
    run(check_backward, check_second_call)
