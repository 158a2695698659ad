"""Masks of samples that share a row, which nobody makes where attention does not read them.

Transformers makes a mask of all pairs of tokens in the forward of a backbone, and gives it to each
layer. Of several samples in a row all that it says is which key each position sees first
(``kernels/attention/first_keys.py``), so a ``SampleMask`` takes its place: a tensor that has no
values until something reads them. A block is captured with the first keys, of which a node of its
graph makes the mask; where rules have left nothing that reads that node, the mask is never made.
All else (other blocks, hooks, a model's own code) finds the values that transformers would have
made, made once.

Only transformers' causal masks, with and without a sliding window, are replaced; all other
functions make their masks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..kernels.attention.first_keys import first_keys, sample_mask


@dataclass
class _Values:
    """The values of a mask and of those that share memory with it."""

    whole: Tensor | None = None
    version: int = 0
    is_open: bool = False  # whether others share it that nobody knows of, and may write to it


class SampleMask(Tensor):
    """A mask (B, 1, T, T) whose values are made at the first use of them."""

    _first: Tensor
    _made: _Values

    @staticmethod
    def __new__(
        cls, first: Tensor, dtype: torch.dtype, values: _Values | None = None
    ) -> SampleMask:
        """Make that of first keys (B, 1, T, 1)."""
        batch, _, time, _ = first.shape
        result: SampleMask = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (batch, 1, time, time), dtype=dtype, device=first.device
        )
        result._first, result._made = first, values or _Values()
        return result

    def first(self) -> Tensor | None:
        """The first keys; None where somebody may have written to the values."""
        values = self._made
        is_written = values.whole is not None and values.whole._version != values.version
        return None if values.is_open or is_written else self._first

    def whole(self) -> Tensor:
        """The mask as an ordinary tensor."""
        values = self._made
        if values.whole is None:
            with torch.inference_mode(False), torch.no_grad():
                values.whole = sample_mask(self._first, self.dtype)
            values.version = values.whole._version
        return values.whole

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Those that read memory, and not by way of an operator, get the values."""
        if getattr(function, "__name__", "") in _READ_MEMORY:
            args, kwargs = _whole((args, kwargs or {}), shared=True)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-12-01: torch types it as a function
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Operators get the values."""
        if function is torch.ops.aten.detach.default:
            mask = args[0]
            return SampleMask(mask._first, mask.dtype, mask._made)
        schema = function._schema
        shared = any(a.alias_info is not None for a in (*schema.returns, *schema.arguments))
        args, kwargs = _whole((args, kwargs or {}), shared)
        return function(*args, **kwargs)


_READ_MEMORY = {
    "numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage",
    "__deepcopy__", "__reduce_ex__", "__repr__", "__format__",
}  # fmt: skip


def _whole(values: Any, shared: bool = False) -> Any:
    def made(mask: SampleMask) -> Tensor:
        mask._made.is_open |= shared
        return mask.whole()

    return tree_map_only(SampleMask, made, values)


# --- arguments of blocks --------------------------------------------------------------------------

Places = tuple[tuple[int | str, torch.dtype], ...]
"""Which arguments are masks, by number or name, and their dtypes."""


@dataclass(frozen=True)
class Masked:
    """In place of the code of a region: it is called with first keys, and captured apart."""

    code: Hashable
    places: Places


def with_whole_masks(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with masks as they would have been."""
    if not _has_masks((args, kwargs)):
        return args, kwargs
    made: tuple[tuple[Any, ...], dict[str, Any]] = _whole((args, kwargs))
    return made


def _has_masks(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_masks, value))
    if isinstance(value, dict):
        return any(map(_has_masks, value.values()))
    return type(value) is SampleMask


def with_first_keys(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Places]:
    """The arguments of a call, with first keys in place of masks, and where these are."""
    if not any(type(v) is SampleMask for v in (*args, *kwargs.values())):
        return args, kwargs, ()
    named: dict[Any, Any] = {**_numbered(args), **kwargs}
    masks = {place: v for place, v in named.items() if isinstance(v, SampleMask)}
    first = {place: mask.first() for place, mask in masks.items()}
    known = {place: keys for place, keys in first.items() if keys is not None}
    if not known:
        return args, kwargs, ()
    args = tuple(known.get(i, a) for i, a in enumerate(args))
    kwargs = {name: known.get(name, value) for name, value in kwargs.items()}
    return args, kwargs, tuple((place, masks[place].dtype) for place in known)


def _numbered(args: tuple[Any, ...]) -> dict[Any, Any]:
    return dict(enumerate(args))


def making_masks(function: Callable[..., Any], places: Places) -> Callable[..., Any]:
    """``function``, a forward, called with first keys of which it makes its masks."""

    @functools.wraps(function)
    def forward(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        # not in place: TorchDynamo would return what it finds in the arguments of the call
        values: dict[Any, Any] = {**_numbered(args), **kwargs}
        for place, dtype in places:
            values[place] = sample_mask(values[place], dtype)
        positional = [values.pop(i) for i in range(len(args))]
        return function(module, *positional, **values)

    return forward


# --- the functions that make masks ----------------------------------------------------------------

SHORT = 512
"""Positions of a row below which masks are made.

They are small there, and on CPUs that leave attention with a mask to PyTorch (in fp32) it is as
fast: ours took 1.7 times its time at 128 positions, 0.8 at 512, 0.3 to 0.6 at 1,024, forward and
backward of 9 heads of 64 features on one thread (AMD, 2026-12-01).
"""

_READ = ("config", "inputs_embeds", "position_ids")
_SLIDES = {"create_causal_mask": False, "create_sliding_window_causal_mask": True}


@functools.lru_cache(maxsize=256)
def makes_masks(function: Callable[..., Any]) -> bool:
    """Return True for functions that make masks, and may be given positions."""
    parameters = inspect.signature(function).parameters
    return {"config", "inputs_embeds", "attention_mask", "position_ids"} <= set(parameters)


def lazy_mask(
    function: Callable[..., Any], kwargs: Mapping[str, Any], starts: Tensor
) -> SampleMask | None:
    """Return the mask that ``function``, called with ``kwargs``, would make; None if unknown.

    ``starts`` (B, T), int32, contains where the sample of each position begins.
    """
    if starts.shape[1] < SHORT or any(kwargs[n] is not None for n in kwargs if n not in _READ):
        return None
    is_known = function.__module__ == "transformers.masking_utils" and _is_of_library(function)
    slides = _SLIDES.get(function.__name__) if is_known else None
    config, inputs = kwargs["config"], kwargs["inputs_embeds"]
    dtypes = {"sdpa": torch.bool, "eager": inputs.dtype}
    dtype = dtypes.get(getattr(config, "_attn_implementation", ""))
    if slides is None or dtype is None or not getattr(config, "is_causal", True):
        return None
    return SampleMask(first_keys(starts, config.sliding_window if slides else None), dtype)


def _is_of_library(function: Any) -> bool:
    # a wrapper of another package, around a function of transformers, has its name as well
    return str(function.__globals__.get("__name__")).startswith("transformers.")
