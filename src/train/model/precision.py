"""Where training computes, and in which dtype."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ...kernels.processor import processor
from ..recipe.recipe import Recipe


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


def has_bfloat16() -> bool:
    """Whether the training device has instructions for bfloat16.

    PyTorch computes in it without them, too. On a CPU that is slow: two matrices multiply at 0.9
    GFLOP/s on a core with AVX2, at 36 in float32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor().bfloat16


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


_NORMS = ("RMSNorm", "LayerNorm")
"""How the names of the classes of norms end, where the recipe does not say."""


def keep_norms_in_float32(model: nn.Module, recipe: Recipe) -> None:
    """Let norms have weights of float32, and compute in it, where the recipe wants that.

    What they return has the dtype that they were given, so that all else computes as before.

    Args:
        model: in the dtype of the recipe; changed in place.
        recipe: which says whether to, and which modules are norms.

    Raises:
        RecipeError: the model has no such modules.
    """
    if not recipe.fp32_norms:
        return
    names = tuple(recipe.fp32_norm_classes or _NORMS)
    norms = [m for m in model.modules() if _is_one_of(type(m), names)]
    if not norms:
        raise RecipeError(f"fp32_norm_classes: the model has no {' or '.join(names)}")
    for norm in norms:
        kind: Any = type(norm)
        dtype = next((p.dtype for p in norm.parameters()), torch.float32)
        if dtype in (torch.bfloat16, torch.float16):
            norm.float()
            norm.__class__ = _with_own_dtype(kind)


def _is_one_of(kind: type, names: tuple[str, ...]) -> bool:
    """Whether a class has one of these names: its end, or with a dot the whole path."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return any(path == n if "." in n else kind.__name__.endswith(n) for n in names)


@functools.cache
def _with_own_dtype(kind: Any) -> Any:
    """A subclass of a norm that computes in the dtype of its weights, whatever it is given.

    A class rather than hooks: a block with a hook inside cannot be captured. Its objects are copied
    and pickled as those of ``kind``, by a function that makes the subclass again.
    """

    class Norm(kind):  # type: ignore[misc]  # 2026-11-27: a class that only the model knows
        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            own = next(self.parameters()).dtype
            given = next(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            named = {name: _as(v, own) for name, v in kwargs.items()}
            return _as(super().forward(*[_as(v, own) for v in args], **named), given)

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *state = super().__reduce_ex__(protocol)
            return (_empty, (kind,), *state)

    Norm.__name__, Norm.__qualname__ = kind.__name__, kind.__qualname__
    Norm.__module__, Norm.__doc__ = kind.__module__, kind.__doc__
    return Norm


def _as(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of numbers in another dtype; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _empty(kind: Any) -> Any:
    """An object of the subclass whose attributes are yet to be set."""
    made = _with_own_dtype(kind)
    return made.__new__(made)
