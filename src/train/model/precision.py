"""Where training computes, and in which dtype."""

from __future__ import annotations

import functools
import platform

import torch

from ...errors import RecipeError


def device_for_training() -> torch.device:
    """The device that the trainer will use."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def dtype_for_training(precision: str, adapters: bool = True) -> torch.dtype:
    """The dtype of the weights.

    Args:
        precision: as ``Recipe.precision()`` says.
        adapters: only adapters are trained, which keep a dtype of their own.

    Raises:
        RecipeError: the device cannot compute in it.
    """
    gpu = torch.cuda.is_available()
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    if precision == "bfloat16":
        if gpu and not torch.cuda.is_bf16_supported():
            raise RecipeError("bf16: this GPU has no bfloat16; set bf16: auto, or fp16: true")
        return torch.bfloat16
    if precision == "float16":
        if not gpu:
            raise RecipeError("fp16: needs a GPU; set bf16: auto, which works on this machine")
        # a scaled loss needs gradients of float32: weights that are trained themselves stay so
        return torch.float16 if adapters else torch.float32
    return torch.float32


@functools.cache
def has_bfloat16() -> bool:
    """Whether the training device has instructions for bfloat16.

    PyTorch computes in it without them, too. On a CPU that is slow: two matrices multiply at 0.9
    GFLOP/s on a core with AVX2, at 36 in float32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):
        cpu = torch.cpu
        return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision_warning(precision: str) -> str | None:
    """What the user should know of a precision that the device only imitates; None otherwise."""
    if precision != "bfloat16" or has_bfloat16():
        return None
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return (
        f"bf16: this {device} has no instructions for bfloat16 and imitates it; layers that are "
        "not rewritten can be many times slower than in float32; with bf16: auto a run takes what "
        "the machine has"
    )
