"""A kernel that fails after others of its op have run: the plain form takes up what they kept."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from fusewright.kernels import fallback
from tests.kernels.calls import CALLS, Call, Draw
from tests.kernels.failing_launches import ERRORS, clean
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity_of_draws

LATER = {
    "rms_norm-inner": "norms.rms_norm_triton:backward",
    "add_rms_norm": "norms.rms_norm_triton:backward",
    "rms_norm_linear": "norms.rms_norm_triton:backward",
    "layer_norm": "norms.layer_norm_triton:backward",
    "glu-silu": "mlp.glu_triton:backward",
    "glu_packed": "mlp.glu_triton:packed_backward",
    "mlp_block-input": "mlp.glu_triton:backward",
    "moe_experts-bias": "moe.moe_experts_triton:grouped_outer",
    "linear_logprob-two-softcap": "loss.linear_logprob_triton:differentiate",
    "selective_scan": "scan.selective_scan_triton:backward",
    "ssd": "scan.ssd_triton:backward",
}
"""Call -> what its backward launches, after its forward has launched other kernels."""


def check_backward() -> None:
    for name, launcher in LATER.items():
        _check(name, launcher, after=0)


def check_second_call() -> None:
    """In forward, of an op whose first call went well; in backward, of one that runs in both."""
    _check("rms_norm-inner", "norms.rms_norm_triton:forward", after=1)
    _check("glu-silu", "mlp.glu_triton:forward", after=1)
    _check("rope", "attention.rope_triton:rotate", after=1)
    _check("lora_linear", "linear.lora_linear_triton:rank_update", after=1)


def _check(name: str, launcher: str, after: int) -> None:
    module_name, function_name = launcher.split(":")
    module = importlib.import_module(f"fusewright.kernels.{module_name}")
    launch = getattr(module, function_name)
    fails = _fails_after(launch, after)
    seeds = itertools.count()

    def draw() -> Call:
        return CALLS[name](Draw((2, 7, 32), torch.float32, True, "cpu", next(seeds)))

    call = draw()
    with (
        clean(),
        mock.patch.object(module, function_name, fails),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            assert_parity_of_draws(call.ours, call.reference, lambda: draw().inputs)
        assert len(fallback.FAILED) == 1, (name, fallback.FAILED)
    assert len([w for w in caught if "could not be compiled" in str(w.message)]) == 1, name


def _fails_after(launch: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = [calls]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return launch(*args)
        raise ERRORS["resources"]()

    return failing


if __name__ == "__main__":
    torch.manual_seed(0)
    run(check_backward, check_second_call)
