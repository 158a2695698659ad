"""The engines that ``train_step.py`` compares: each makes a loaded model train its own way.

An engine is a function from the model, as Transformers and PEFT built it, to what is called in the
training loop. Its imports and its own preparation count towards the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class EngineUnavailableError(Exception):
    """The engine is not installed, or cannot run on this device."""


def eager(model: Any) -> Any:
    """Transformers and PEFT as they are, with PyTorch's fused attention (SDPA)."""
    return model


def compile_whole(model: Any) -> Any:
    """``torch.compile`` over the whole model, with its defaults."""
    import torch

    return torch.compile(model)


def fusewright(model: Any) -> Any:
    """``fusewright.optimize`` with its defaults."""
    from fusewright import optimize

    return optimize(model)


def liger(model: Any) -> Any:
    """Liger-Kernel's patches, on this one instance."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise EngineUnavailableError("liger-kernel is not installed") from error
    if next(model.parameters()).device.type != "cuda":
        raise EngineUnavailableError("liger-kernel has Triton kernels only, which need a GPU")
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _apply_liger_kernel_to_instance(model=causal_lm)
    return model


ENGINES: dict[str, Callable[[Any], Any]] = {
    "eager": eager,
    "compile": compile_whole,
    "fusewright": fusewright,
    "liger": liger,
}
