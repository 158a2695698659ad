"""The device and the dtype of training."""

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

    ``precision`` is the result of ``Recipe.precision()``; with ``adapters`` only these are trained,
    in their own dtype. Raises a RecipeError if the device cannot compute in it.
    """
    kind = computes_in(precision)
    if kind == "bfloat16":
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise RecipeError("bf16: this GPU has no bfloat16; set bf16: auto, or fp16: true")
        return torch.bfloat16
    if kind == "float16":
        if not scales_losses():
            raise RecipeError("fp16: needs a GPU; set bf16: auto, which works on this machine")
        return float16_weights(adapters)
    return torch.float32


def computes_in(precision: str) -> str:
    """``precision``, a result of ``Recipe.precision()``; in place of ``auto``, what the device has.

    A GPU without instructions for bfloat16 multiplies float16 several times as fast as float32.
    """
    if precision != "auto":
        return precision
    if has_bfloat16():
        return "bfloat16"
    return "float16" if scales_losses() else "float32"


def float16_weights(adapters: bool) -> torch.dtype:
    """The dtype of weights where products are in float16.

    A scaled loss needs gradients of float32: weights that are trained themselves stay so.
    """
    return torch.float16 if adapters else torch.float32


def half_autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a run in float16 computes in before the trainer has put it into the model.

    There, whole modules that are trained are in float32 among others.
    """
    return torch.autocast(device.type, torch.float16, enabled=computes_in(precision) == "float16")


def scales_losses() -> bool:
    """Whether accelerate trains in float16, with scaled losses: it does on no CPU."""
    return torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Whether the training device has instructions for bfloat16.

    PyTorch computes in it without them, too. On a CPU that is slow: two matrices multiply at 0.9
    GFLOP/s on a core with AVX2, at 36 in float32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor().bfloat16


def precision_warning(precision: str) -> str | None:
    """A warning about a precision that the device only emulates; None otherwise."""
    if precision != "bfloat16" or has_bfloat16():
        return None
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return (
        f"bf16: this {device} has no instructions for bfloat16 and imitates it; layers that are "
        "not rewritten can be many times slower than in float32; with bf16: auto a run takes what "
        "the machine has"
    )


_NORMS = ("RMSNorm", "LayerNorm")
"""Suffixes of the class names of norms, where the recipe names none."""


def keep_norms_in_float32(model: nn.Module, recipe: Recipe) -> None:
    """Keep the weights of norms in float32, and compute in it, where the recipe says so.

    The norms return the dtype of their input, so that all else computes as before. ``model`` has
    the dtype of the recipe, and is changed in place. Raises a RecipeError if it has no norms.
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
            norm.__class__ = _in_weight_dtype(kind)


def _is_one_of(kind: type, names: tuple[str, ...]) -> bool:
    """Whether a class has one of these names: a suffix, or, with a dot, the whole path."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return any(path == n if "." in n else kind.__name__.endswith(n) for n in names)


@functools.cache
def _in_weight_dtype(kind: Any) -> Any:
    """A subclass of a norm that computes in the dtype of its weights, whatever its input's.

    A class rather than hooks: a block with a hook inside cannot be captured. Its objects are copied
    and pickled as those of ``kind``, by a function that makes the subclass again.
    """

    class Norm(kind):  # type: ignore[misc]  # 2026-11-27: a class that only the model knows
        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            dtype = next(self.parameters()).dtype
            input_dtype = next(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            cast = {name: _as(v, dtype) for name, v in kwargs.items()}
            return _as(super().forward(*[_as(v, dtype) for v in args], **cast), input_dtype)

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *state = super().__reduce_ex__(protocol)
            return (_empty, (kind,), *state)

    Norm.__name__, Norm.__qualname__ = kind.__name__, kind.__qualname__
    Norm.__module__, Norm.__doc__ = kind.__module__, kind.__doc__
    return Norm


def _as(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _empty(kind: Any) -> Any:
    """An object of the subclass, without attributes."""
    norm = _in_weight_dtype(kind)
    return norm.__new__(norm)
