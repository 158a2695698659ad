"""Where the samples of a row begin: one value of each step, which blocks are called with.

Transformers takes a row for several samples where ``position_ids`` do not count on, and no mask and
no cache say otherwise (``masking_utils.find_packed_sequence_indices``). Its attention keeps such
samples apart; what is recurrent goes on from one to the next. Here a call of a head or a backbone
with such positions is a *step* that has segments, and the blocks whose code calls a scan or a short
convolution are captured with copies of it that give them the segments (``segmented_copies``).
Blocks that hold another layer that lets samples see each other (``ByRows``) are captured in parts.
All other blocks, and all calls of rows with one sample, are not concerned.

A block that runs once more in backward, in somebody's checkpoint, is called without the head. It
knows its step by its input, which a checkpoint keeps.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import OptimizeError
from ..graph.opaque.segments import run_rows
from ..kernels.direct import is_traced_here
from ..kernels.op import sample_starts
from ..memory.apply_plan import in_backward, inside_checkpoint
from .bypass import CACHE_ARGUMENTS
from .copies.forward_copies import FunctionCopies
from .sample_masks import SampleMaskKinds, makes_masks

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name, in modules that call it
_OTHERWISE = ("attention_mask", *CACHE_ARGUMENTS)
"""With one of these transformers takes a row for one sample."""


class ModelStep:
    """One call of a model: which samples its rows hold, worked out when a block first asks."""

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        """Note what a call of a head or a backbone says of its rows."""
        given = kwargs.get("position_ids")
        others = (kwargs.get(name) is not None for name in _OTHERWISE)
        known = isinstance(given, Tensor) and not isinstance(given, FakeTensor) and not any(others)
        self.given = given if known else None
        self.positions = None if self.given is None else _of_text(self.given)
        self.has_positions = self.positions is not None
        self._version = _version(self.given)
        # by the number of rows and the device
        self._segments: dict[tuple[int, torch.device], Tensor | None] = {}

    def is_of(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether another call says the same, by a tensor that nobody has written to since."""
        version = self._version
        given = ModelStep(kwargs).given
        return version is not None and given is self.given and _version(given) == version

    def of(self, x: Tensor | None) -> Tensor | None:
        """The segments (B, L) of hidden states (B, L, D); None where no row has several."""
        if self.positions is None or x is None or x.dim() != 3:
            return None
        batch, length = x.shape[:2]
        if self.positions.shape[-1] != length:  # of a tower, say
            return None
        return self._of_rows(self.positions, batch, x.device)

    def has_several(self) -> bool:
        """Whether a row has several samples."""
        positions = self.positions
        if positions is None:
            return False
        return self._of_rows(positions, positions.shape[0], positions.device) is not None

    def _of_rows(self, positions: Tensor, batch: int, device: torch.device) -> Tensor | None:
        key = batch, device
        if key not in self._segments:
            self._segments[key] = _segments(positions, batch, device)
        return self._segments[key]


def _is_same(one: Any, other: Tensor) -> bool:
    """Whether two tensors are the same elements."""
    # models take the positions in the text from those of several axes
    is_plain = isinstance(one, Tensor) and not torch._C._are_functorch_transforms_active()
    return is_plain and (
        one is other
        or (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def _version(t: Tensor | None) -> int | None:
    return None if t is None or t.is_inference() else t._version


def _of_text(positions: Tensor) -> Tensor | None:
    """The positions (B, L) in the text, or None where they say nothing of samples."""
    if positions.dim() == 3 and positions.shape[0] == 4:
        return positions[0]  # the others are time, height and width
    return positions if positions.dim() == 2 else None


@torch.no_grad()
def _segments(positions: Tensor, batch: int, device: torch.device) -> Tensor | None:
    """Where segments begin, by position; one host synchronisation."""
    if positions.shape[0] not in (1, batch):
        return None
    # their values are read, which those of what a transform of torch.func has made are not
    while torch._C._functorch.is_gradtrackingtensor(positions):
        positions = torch._C._functorch.get_unwrapped(positions)
    is_batched = torch._C._functorch.is_batchedtensor(positions)
    with nullcontext() if is_batched else torch._C._DisableFuncTorch():
        first = sample_starts(positions)
        several = bool(first.any())
        return first.expand(batch, -1).contiguous().to(device) if several else None


_APART = "runs over each of them apart"


class ByRows:
    """The modules of blocks that are run over samples as rows of their own (``packs.py``).

    Attributes:
        places: where they are in their block, and their class: it is so in each block that has one
            of that class there, also in one of a copy of the model.
        problem: why samples may see each other all the same, or empty.
    """

    def __init__(self) -> None:
        self.places: set[tuple[str, type[nn.Module]]] = set()
        self.problem = ""
        self._found: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, nn.Module]]] = (
            weakref.WeakKeyDictionary()
        )

    def in_block(self, block: nn.Module) -> list[tuple[str, nn.Module]]:
        """Those of ``block``, outermost ones alone, with their places; it may be one itself."""
        if not self.places:
            return []
        modules: dict[str, nn.Module] = {}
        for place, kind in sorted(self.places, key=lambda p: p[0]):
            m = _at(block, place)
            if isinstance(m, kind) and not any(is_below(place, outer) for outer in modules):
                modules[place] = m
        return list(modules.items())

    def hold(self, block: nn.Module) -> None:
        """Remember which modules of ``block`` run by rows, to see when others take their place."""
        self._found[block] = self.in_block(block)

    def concern(self, block: nn.Module) -> bool:
        """Whether modules of ``block`` are run by rows, or were found to need it."""
        return bool(self.in_block(block) or self._found.get(block))

    def require_the_same(self, block: nn.Module) -> None:
        """Raise where a module to be run by rows has been wrapped or replaced since."""
        for place, m in self._found.get(block, []):
            if _at(block, place) is not m:
                raise OptimizeError(
                    f"samples share rows (position_ids), and {place} ({type(m).__name__}), which "
                    f"{_APART}, has been wrapped or replaced since: call optimize(model, "
                    "packs=True) again"
                )

    def reason(self, block: nn.Module) -> str | None:
        """Why ``block`` is captured in parts, in all calls, or None."""
        # a checkpoint may run it again when rows of another kind have been given
        places = [place or "itself" for place, _ in self.in_block(block)]
        return (
            f"samples may share its rows, and {' and '.join(places)} {_APART}" if places else None
        )

    def forward_of(
        self, place: str, module: nn.Module, slot: Slot, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What runs ``function``, the forward of ``module``, over the segments in ``slot``."""

        def forward(_: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            return self.run(place, module, slot, function, args, kwargs)

        return forward

    def run(
        self, place: str, module: nn.Module, slot: Slot, function: Any, args: Any, kwargs: Any
    ) -> Any:
        """``function`` of each segment, if there are any; it has one sample in each row itself."""
        segments, slot.value = slot.value, None
        if segments is not None and slot.mode != _mode():
            slot.value = segments
            raise OptimizeError(
                f"samples share rows (position_ids), and a checkpoint inside its block surrounds "
                f"{place} ({type(module).__name__}), which {_APART}: let it surround the whole "
                "block; or do not pack"
            )
        try:
            if segments is None:
                return function(*args, **kwargs)
            return run_rows(function, segments, args, kwargs)
        finally:
            slot.value = segments


def is_below(path: str, outer: str) -> bool:
    """Whether the module at ``path`` is inside of that at ``outer``."""
    return outer == "" or path.startswith(f"{outer}.")


def _at(module: nn.Module, path: str) -> nn.Module | None:
    m: nn.Module | None = module
    for name in path.split(".") if path else ():
        m = None if m is None else m._modules.get(name)
    return m


@dataclass(frozen=True)
class BlockSegments:
    """What a block that mixes positions is called with: its step, and where segments begin."""

    step: ModelStep
    segments: Tensor | None


@dataclass(frozen=True)
class Segmented:
    """In place of the code of a region: it is called with segments, and captured apart."""

    code: Hashable


class Slot:
    """The segments of the block at hand, where its captured code reads them.

    ``mode`` tells whether what runs is inside of a checkpoint that the block is not.
    """

    value: Tensor | None = None
    mode: tuple[bool, bool] = True, False


def _mode() -> tuple[bool, bool]:
    # a reentrant checkpoint runs without gradients; the other kind has hooks on what is saved
    return torch.is_grad_enabled(), inside_checkpoint()


class StepSegments:
    """The step that the models of one session are in, and what its blocks are to be given."""

    def __init__(self) -> None:
        self.slot = Slot()
        self._step: ModelStep | None = None
        self._any = False  # whether a step has had segments
        self._last = ModelStep({})  # of a block that was called by itself
        # by the input of a block, for when a checkpoint runs it again
        self._steps: MutableMapping[Tensor, ModelStep] = WeakTensorKeyDictionary()
        self._masks = FunctionCopies(self._mask_of, live=True)
        self._kinds = SampleMaskKinds()
        self._tells = False

    def entering(self, forward: Callable[..., Any], original: Callable[..., Any]) -> Any:
        """``forward`` of a head or a backbone, whose calls are steps."""
        names = _positional(original)

        def entered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_traced_here():
                return forward(module, *args, **kwargs)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            outer, positions = self._step, named.get("position_ids")
            if outer is None or (positions is not None and positions is not outer.given):
                self._step = ModelStep(named)
            try:
                return forward(module, *args, **kwargs)
            finally:
                self._step = outer

        return entered

    def has_several(self) -> bool:
        """Whether the rows of the step at hand hold several samples."""
        return self._step is not None and self._step.has_several()

    def run_backbone(
        self, original: Callable[..., Any], function: Any, module: nn.Module, args: Any,
        kwargs: Any, tells: bool,
    ) -> Any:  # fmt: skip
        """Call a backbone, whose masks of samples are made when they are read.

        With ``tells`` they are told of the positions of the step.
        """
        if self._step is not None and self._step.has_positions:
            copy = self._masks.of(function)
            if copy is not None:
                outer, self._tells = self._tells, tells
                try:
                    return copy(module, *args, **kwargs)
                finally:
                    self._tells = outer
        return original(module, *args, **kwargs)

    def _mask_of(self, value: Any, names: set[str]) -> Any:
        """In place of a function that makes a mask, and may be told of positions, one that is."""
        if not isinstance(value, types.FunctionType) or not makes_masks(value):
            return None

        @functools.wraps(value)
        def mask(*args: Any, **kwargs: Any) -> Any:
            step = self._step
            if step is None or step.positions is None or args:
                return value(*args, **kwargs)
            (batch, length), sizes = kwargs["inputs_embeds"].shape[:2], step.positions.shape
            if sizes[1] != length or sizes[0] not in (1, batch):
                return value(**kwargs)
            # transformers' Granite 4 makes them without (5.24): samples in a row would be one
            if kwargs.get("position_ids") is None and self._tells:
                kwargs["position_ids"] = step.positions
            lazy = None
            if _is_same(kwargs.get("position_ids"), step.positions):
                starts = step.of(kwargs["inputs_embeds"])
                lazy = None if starts is None else self._kinds.mask(value, kwargs, starts)
            return value(**kwargs) if lazy is None else lazy

        return mask

    def concern(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of a block may have segments, or may run again after one that had."""
        if self._any or inside_checkpoint():
            return True
        if self._step is not None:
            return self._step.has_positions
        return kwargs.get("position_ids") is not None

    def of_block(self, x: Tensor | None, kwargs: Mapping[str, Any]) -> BlockSegments:
        """What a call of a block that mixes positions belongs to, and the segments of ``x``.

        Raises:
            OptimizeError: a block runs once more in backward, and nothing tells of which step.
        """
        step = self._step
        if step is not None:
            if x is not None:
                self._steps[x] = step
        elif in_backward():
            step = None if x is None else self._steps.get(x)
            if step is None and self._any:
                raise OptimizeError(_UNKNOWN)
        if step is None:
            if not self._last.is_of(kwargs):
                self._last = ModelStep(kwargs)
            step = self._last
        segments = step.of(x)
        self._any = self._any or segments is not None
        return BlockSegments(step, segments)

    @contextmanager
    def given(self, call: BlockSegments) -> Iterator[None]:
        """While a block runs."""
        slot = self.slot
        outer = self._step, slot.value, slot.mode
        self._step, slot.value, slot.mode = call.step, call.segments, _mode()
        try:
            yield
        finally:
            self._step, slot.value, slot.mode = outer


@contextmanager
def binding_checkpoints(
    block: nn.Module, around: Callable[[], AbstractContextManager[Any]], all_of_them: bool
) -> Iterator[None]:
    """For one call of a block's original code, surround what its checkpoints run, now and again.

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
            attributes[_CHECKPOINT] = _surrounding(checkpoint, around)
        yield
    finally:
        for attributes, checkpoint in bound:
            attributes[_CHECKPOINT] = checkpoint


def _surrounding(
    checkpoint: Callable[..., Any], around: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    """``checkpoint``, whose function runs in ``around()`` each time."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with around():
                return function(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    return call


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
