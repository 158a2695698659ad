"""Segments: the positions at which the samples of a row begin, one value for each call.

Transformers takes a row for several samples where ``position_ids`` do not count on, and no mask and
no cache say otherwise (``masking_utils.find_packed_sequence_indices``). Its attention keeps such
samples apart; what is recurrent goes on from one to the next. Here a call of a head or a backbone
with such positions has segments, and the blocks whose code calls a scan or a short
convolution are captured with copies of it that give them the segments (``segmented_copies``).
Other blocks, and calls of rows with one sample, are not concerned. Models with layers that mix
positions in another way are not packed (``packs.py``).

A block that a checkpoint runs once more in backward is called without the head. Its call is found
by its input, which a checkpoint keeps.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import OptimizeError
from ..kernels.direct import is_traced_here
from ..kernels.op import sample_starts
from ..memory.apply_plan import in_backward
from .bypass import CACHE_ARGUMENTS
from .copies.forward_copies import FunctionCopies
from .sample_masks import lazy_mask, makes_masks

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name, in modules that call it
_OTHERWISE = ("attention_mask", *CACHE_ARGUMENTS)
"""With one of these transformers takes a row for one sample."""


class RowSegments:
    """The segments of one call of a model, computed when first needed."""

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        """Take the positions among the arguments of a head, a backbone or a block."""
        given = kwargs.get("position_ids")
        others = (kwargs.get(name) is not None for name in _OTHERWISE)
        known = isinstance(given, Tensor) and not isinstance(given, FakeTensor) and not any(others)
        self.given = given if known else None
        self.positions = None if self.given is None else _of_text(self.given)
        self.in_all_masks = False  # whether masks that are made without positions get them, too
        # by the number of rows and the device
        self._starts: dict[tuple[int, torch.device], Tensor | None] = {}

    def of(self, x: Tensor | None) -> Tensor | None:
        """Return the segments (B, L) of hidden states (B, L, D); None if no row has several."""
        positions = self.positions
        # of a tower, for one, or of rows that are repeated
        if positions is None or x is None or x.dim() != 3 or positions.shape[1] != x.shape[1]:
            return None
        return self._of_rows(positions, x.shape[0], x.device)

    def has_several(self) -> bool:
        """Return True if a row has several samples."""
        p = self.positions
        return p is not None and self._of_rows(p, p.shape[0], p.device) is not None

    @torch.no_grad()
    def _of_rows(self, positions: Tensor, batch: int, device: torch.device) -> Tensor | None:
        if positions.shape[0] not in (1, batch):
            return None
        key = batch, device
        if key not in self._starts:
            starts = sample_starts(positions)
            several = bool(starts.any())  # synchronizes with the device
            rows = starts.expand(batch, -1).contiguous().to(device)
            self._starts[key] = rows if several else None
        return self._starts[key]


def _is_same(one: Any, other: Tensor) -> bool:
    """Return True if two tensors are the same elements."""
    # models take the positions in the text from those of several axes
    is_plain = isinstance(one, Tensor) and not torch._C._are_functorch_transforms_active()
    return is_plain and (
        one is other
        or (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def _without_padding(mask: Any) -> Any:
    """Return None for a mask of ones, with which transformers looks for no samples."""
    # the caller has given none: the model has made it (BioGPT, BART)
    is_padding = isinstance(mask, Tensor) and mask.dim() == 2
    return None if is_padding and bool(mask.all()) else mask


def _of_text(positions: Tensor) -> Tensor | None:
    """Return the positions (B, L) in the text, or None if they are of another form."""
    if positions.dim() == 3 and positions.shape[0] == 4:
        return positions[0]  # the others are time, height and width
    return positions if positions.dim() == 2 else None


@dataclass(frozen=True)
class BlockSegments:
    """The segments of a model's call, and those of the rows of one block in it."""

    call: RowSegments
    segments: Tensor | None


@dataclass(frozen=True)
class Segmented:
    """In place of the code of a region: it is called with segments, and captured apart."""

    code: Hashable


class Slot:
    """The segments of the block at hand, where its captured code reads them."""

    value: Tensor | None = None


class StepSegments:
    """The segments of the call that the models of one session are in."""

    def __init__(self) -> None:
        self.slot = Slot()
        self._call: RowSegments | None = None
        self._any = False  # whether a call has had segments
        # by the input of a block, for when a checkpoint runs it again
        self._calls: MutableMapping[Tensor, RowSegments] = WeakTensorKeyDictionary()
        self._masks = FunctionCopies(self._mask_of, live=True)

    def entering(self, forward: Callable[..., Any], original: Callable[..., Any]) -> Any:
        """Return ``forward`` of a head or a backbone, with its segments set while it runs."""
        names = _positional(original)

        def entered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced_here():
                return forward(module, *args, **kwargs)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            outer, positions = self._call, named.get("position_ids")
            if outer is None or (positions is not None and positions is not outer.given):
                self._call = RowSegments(named)
            try:
                return forward(module, *args, **kwargs)
            finally:
                self._call = outer

        return entered

    def has_several(self) -> bool:
        """Return True if the rows of the call at hand hold several samples."""
        return self._call is not None and self._call.has_several()

    def run_backbone(
        self, original: Callable[..., Any], function: Any, module: nn.Module, args: Any,
        kwargs: Any, in_all_masks: bool,
    ) -> Any:  # fmt: skip
        """Call a backbone, whose masks of samples are made when they are read.

        With ``in_all_masks``, masks that its code makes without positions get them, too.
        """
        call, copy = self._call, None
        if call is not None and call.positions is not None:
            call.in_all_masks, copy = in_all_masks, self._masks.of(function)
        return (original if copy is None else copy)(module, *args, **kwargs)

    def _mask_of(self, value: Any, names: set[str]) -> Any:
        """Return what is called in place of a function that makes masks; None for others."""
        if not isinstance(value, types.FunctionType) or not makes_masks(value):
            return None

        @functools.wraps(value)
        def mask(*args: Any, **kwargs: Any) -> Any:
            call, inputs = self._call, kwargs.get("inputs_embeds")
            if call is None or call.positions is None or args or inputs is None:
                return value(*args, **kwargs)
            rows, length = call.positions.shape
            if length != inputs.shape[1] or rows not in (1, inputs.shape[0]):
                return value(**kwargs)
            # transformers' Granite 4 makes them without (5.24): samples in a row would be one
            if kwargs.get("position_ids") is None and call.in_all_masks:
                kwargs["position_ids"] = call.positions
                kwargs["attention_mask"] = _without_padding(kwargs["attention_mask"])
            starts = (
                call.of(inputs) if _is_same(kwargs.get("position_ids"), call.positions) else None
            )
            lazy = None if starts is None else lazy_mask(value, kwargs, starts)
            return value(**kwargs) if lazy is None else lazy

        return mask

    def of_block(self, x: Tensor | None, kwargs: Mapping[str, Any]) -> BlockSegments:
        """Return the segments of the call that a block which mixes positions belongs to.

        Raises:
            OptimizeError: a block runs once more in backward, of an unknown call.
        """
        call = self._call
        if call is not None:
            if x is not None:
                self._calls[x] = call
        elif in_backward():
            call = None if x is None else self._calls.get(x)
            if call is None and self._any:
                raise OptimizeError(_UNKNOWN)
        call = call or RowSegments(kwargs)
        segments = call.of(x)
        self._any = self._any or segments is not None
        return BlockSegments(call, segments)

    @contextmanager
    def given(self, block: BlockSegments) -> Iterator[None]:
        """Set the segments while a block runs."""
        outer = self._call, self.slot.value
        self._call, self.slot.value = block.call, block.segments
        try:
            yield
        finally:
            self._call, self.slot.value = outer


@contextmanager
def binding_checkpoints(
    block: nn.Module, around: Callable[[], AbstractContextManager[Any]], all_of_them: bool
) -> Iterator[None]:
    """For one call of a block's original code, surround the functions that its checkpoints run.

    With ``all_of_them`` those that cannot be surrounded are refused.

    Raises:
        OptimizeError: a module calls a checkpoint of its own, which would run again without.
    """
    bound = []
    for m in block.modules() if torch.is_grad_enabled() else ():
        if m.training and getattr(m, "gradient_checkpointing", False):
            checkpoint = m.__dict__.get(_CHECKPOINT)
            if checkpoint is not None:
                bound.append((m.__dict__, checkpoint))
            elif all_of_them:
                raise OptimizeError(
                    f"samples share rows (position_ids), and {type(block).__name__} runs as it was "
                    f"(explain says why), with a checkpoint in {type(m).__name__}: do not pack, or "
                    "disable gradient checkpointing"
                )
    try:
        for attributes, checkpoint in bound:
            attributes[_CHECKPOINT] = functools.partial(_surrounded, checkpoint, around)
        yield
    finally:
        for attributes, checkpoint in bound:
            attributes[_CHECKPOINT] = checkpoint


def _surrounded(
    checkpoint: Callable[..., Any], around: Callable[[], AbstractContextManager[Any]],
    function: Callable[..., Any], *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Call ``checkpoint`` with a function that runs in ``around()`` each time."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)


_UNKNOWN = (
    "samples share rows (position_ids), and a checkpoint runs a block once more without saying "
    "which of its calls that is: use use_reentrant=False, without hooks that move what a "
    "checkpoint keeps; or do not pack"
)


@functools.lru_cache(maxsize=256)
def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a forward after the module, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.name != "self")
