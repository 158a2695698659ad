"""Small parameters side by side in one buffer, and what may be put there.

``flat.py`` steps them. A *bucket* is the buffer of the small parameters of one group, dtype and
device; a *slice* is a stretch of a bucket whose parameters have had the same steps, so that they
are one tensor with one optimizer state.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ELEMENTWISE = frozenset({
    "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
})  # fmt: skip
"""Classes of ``torch.optim`` whose update of an element reads that element and scalars only."""

BNB_ELEMENTWISE = frozenset({"Adagrad", "Adam", "AdamW", "AdEMAMix", "Lion", "RMSprop", "SGD"})
"""Classes of ``bitsandbytes.optim`` of which the same holds, by name without ``8bit``/``32bit``."""

BLOCK = 256
"""Elements that share one scale in bitsandbytes' blockwise 8-bit states."""

ALIGNMENT = 64
"""Bytes. Matmuls want aligned weights, so that each parameter begins at a multiple of this."""

State = dict[str, Any]


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """Say why ``optimizer`` must see whole tensors, or None where it works element by element."""
    kind = type(optimizer)
    home, name = kind.__module__.partition(".")[0], kind.__name__
    group = f"{kind.__module__}.{name}"
    if home == "torch" and name in ELEMENTWISE:
        if any(g.get("differentiable") for g in optimizer.param_groups):
            return "differentiable=True keeps the graph of each step"
        return None
    if home == "bitsandbytes" and name.removesuffix("8bit").removesuffix("32bit") in (
        BNB_ELEMENTWISE
    ):
        return _why_not_bitsandbytes(optimizer)
    return f"{group} is not known to work element by element"


def _why_not_bitsandbytes(optimizer: Any) -> str | None:
    options = optimizer.args
    if optimizer.is_paged:
        return "paged states stay tensors of their own"
    if options.max_unorm > 0 or getattr(options, "percentile_clipping", 100) < 100:
        return "it clips by the norm of each tensor"
    if options.optim_bits == 8 and not getattr(options, "block_wise", True):
        return "its 8-bit states have one scale for each whole tensor"
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    overrides = optimizer.mng.module_weight_config_triple
    has_overrides = any(id(getattr(module, name)) in mine for module, name, _ in overrides)
    if has_overrides or optimizer.mng.index2config:
        return "GlobalOptimManager has settings for single parameters"
    return None


def alignment(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    """Elements: each parameter of ``dtype`` begins at a multiple of this."""
    blockwise = _blockwise_minimum(optimizer) is not None
    return BLOCK if blockwise else max(1, ALIGNMENT // dtype.itemsize)


def _blockwise_minimum(optimizer: torch.optim.Optimizer) -> int | None:
    """Elements from which bitsandbytes keeps a tensor's state in 8 bits; None: it never does."""
    options = getattr(optimizer, "args", None)
    if getattr(options, "optim_bits", 32) != 8:
        return None
    return int(getattr(options, "min_8bit_size", 4096))


class Bucket:
    """Parameters that live side by side in one buffer; each ``p.data`` is a view of it.

    They have one dtype and device. Their values move here; no copy stays behind. Each begins at a
    multiple of ``align`` elements; what is between them is zero, and so is its gradient.
    """

    def __init__(self, params: Sequence[nn.Parameter], align: int) -> None:
        # Whether the gradient's buffer outlives the step: a GPU's allocator takes it back at no
        # cost; on a CPU, fresh pages cost more than all the copies into them.
        self.params, self.keep = list(params), params[0].device.type == "cpu"
        self.starts: list[int] = []
        self.stops: list[int] = []  # with the padding
        size = 0
        for p in params:
            self.starts.append(size)
            size += -(-p.numel() // align) * align
            self.stops.append(size)
        self.padded = size != sum(p.numel() for p in params)
        self.data = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
        for p, place in zip(params, self._places(self.data), strict=True):
            place.copy_(p.detach())
            p.data = place
        self.addresses = [p.data_ptr() for p in params]
        self._grad = torch.zeros_like(self.data)
        self._grads = self._places(self._grad)
        self.drop()

    def _places(self, flat: Tensor) -> list[Tensor]:
        pairs = zip(self.params, self.starts, strict=True)
        return [flat[start : start + p.numel()].view(p.shape) for p, start in pairs]

    def here(self) -> list[nn.Parameter]:
        """The parameters that were not moved elsewhere (``.to()``, ``p.data = …``)."""
        pairs = zip(self.params, self.addresses, strict=True)
        return [p for p, address in pairs if p.data_ptr() == address]

    def collect(self) -> list[bool]:
        """Copy the gradients into the buffer; say which parameters have one."""
        storage = self._grad.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._grad.numel() * self._grad.itemsize)
            if self.padded:
                self._grad.zero_()
        grads = [p.grad for p in self.params]
        there = [g is not None for g in grads]
        if any(there):
            places = [place for place, has in zip(self._grads, there, strict=True) if has]
            torch._foreach_copy_(places, [g for g in grads if g is not None])
        return there

    def gradient(self, start: int, stop: int) -> Tensor:
        """The collected gradient of a stretch."""
        return self._grad[start:stop]

    def drop(self) -> None:
        """Give the gradient's memory back, unless it is to be kept; the views of it stay."""
        if not self.keep:
            self._grad.untyped_storage().resize_(0)


class BucketSlice:
    """The parameters ``first`` to ``last`` (exclusive) of a bucket, as one ``tensor``, a view."""

    def __init__(self, bucket: Bucket, first: int, last: int) -> None:
        self.bucket, self.first, self.last = bucket, first, last
        self.start, self.stop = bucket.starts[first], bucket.stops[last - 1]
        self.tensor = bucket.data[self.start : self.stop].detach()

    def places(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter, and where it begins in ``tensor``."""
        for i in range(self.first, self.last):
            yield self.bucket.params[i], self.bucket.starts[i] - self.start

    def split(self, there: Sequence[bool]) -> list[BucketSlice]:
        """Slices of neighbours that agree on ``there``, which is over all of the bucket."""
        cuts = [i for i in range(self.first + 1, self.last) if there[i] != there[i - 1]]
        edges = [self.first, *cuts, self.last]
        return [BucketSlice(self.bucket, a, b) for a, b in itertools.pairwise(edges)]


def cut(state: State, size: int, start: int, stop: int, shape: torch.Size | None = None) -> State:
    """The state of a part of a tensor of ``size`` elements; element-wise entries are views.

    ``state`` is that of the whole, of one dimension; the part is ``[start, stop)``. ``shape`` is
    that of its element-wise entries, where it is not flat.
    """
    part: State = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            part[name] = value
        elif name.startswith("absmax"):  # of bitsandbytes: one for each block
            part[name] = value[start // BLOCK : -(-stop // BLOCK)]
        elif value.dim() and value.numel() == size:
            part[name] = value[start:stop] if shape is None else value[start:stop].view(shape)
        else:  # a step count must not be shared: the plain optimizer counts each in place
            part[name] = value.clone() if not value.dim() else value
    return part


def signature(state: State, shape: torch.Size) -> tuple[Any, ...]:
    """What must be equal for two parameters to share one state: entries, dtypes and counts."""
    entries: list[tuple[Any, ...]] = []
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            entries.append((name, value))
        elif value.shape == shape and value.dim():
            entries.append((name, "each", value.dtype, value.device))
        elif value.dim():
            entries.append((name, "all", value.dtype, value.device))
        else:
            entries.append((name, value.item(), value.dtype, value.device))
    return tuple(entries)


def join(piece: BucketSlice, states: Sequence[State]) -> State:
    """The state of ``piece`` from those of its parameters, which have one signature."""
    whole: State = {}
    size = piece.stop - piece.start
    for name, example in states[0].items():
        shape = next(piece.places())[0].shape
        blocks = name.startswith("absmax")
        if not isinstance(example, Tensor) or not example.dim():
            whole[name] = example.clone() if isinstance(example, Tensor) else example
        elif blocks or example.shape == shape:
            step = BLOCK if blocks else 1
            whole[name] = example.new_zeros(size // step)
            for (_, start), state in zip(piece.places(), states, strict=True):
                part = state[name].reshape(-1)
                whole[name][start // step : start // step + part.numel()] = part
        else:  # a table, the same for all
            whole[name] = example
    return whole


def loose_reasons(
    optimizer: torch.optim.Optimizer, threshold: int, ours: Collection[nn.Parameter] = ()
) -> dict[nn.Parameter, str]:
    """The parameters of the element-wise ``optimizer`` that stay separate tensors, with the reason.

    ``threshold`` is the most elements of a small parameter; ``ours`` lie in a buffer of ours
    already, where padding may be between them.
    """
    reasons: dict[nn.Parameter, str] = {}
    tenants: dict[int, list[nn.Parameter]] = defaultdict(list)
    minimum = _blockwise_minimum(optimizer)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.layout != torch.strided:
            reasons[p] = "distributed, quantized or sparse"
        elif not p.requires_grad:
            reasons[p] = "frozen"
        elif p.is_meta or not p.is_floating_point():
            reasons[p] = "not made of real numbers"
        elif not p.dim() or not p.numel():
            reasons[p] = "a scalar or empty"
        elif p.numel() > threshold:
            reasons[p] = f"more than {threshold:,} elements"
        elif minimum is not None and p.numel() < minimum:
            reasons[p] = "too small for 8-bit states"
        elif not p.is_contiguous():
            reasons[p] = "not contiguous"
        if reasons.get(p) != "distributed, quantized or sparse" and not p.is_meta:
            tenants[p.untyped_storage().data_ptr()].append(p)
    for sharing in tenants.values():
        if not (set(sharing) <= set(ours) or _fill_their_storage(sharing)):
            reasons |= {p: "shares its memory" for p in sharing if p not in reasons}
    return reasons


def _fill_their_storage(params: list[nn.Parameter]) -> bool:
    """Whether these parameters are all there is to their storage: nothing else sees it."""
    end = 0
    for p in sorted(params, key=lambda p: p.storage_offset()):
        if p.storage_offset() != end or not p.is_contiguous():
            return False
        end += p.numel()
    return end * params[0].itemsize == params[0].untyped_storage().nbytes()
