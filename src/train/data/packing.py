"""From samples to batches: packs of whole samples, and their collation.

In a pack every sample keeps its own positions, from 0. transformers builds the block-causal mask
from them (when there is no ``attention_mask`` and no cache), so a sample attends only to itself.
What is recurrent (scans, short convolutions) starts anew at each sample in optimized models only
(``compiler/segments.py``). ``leaks`` tests that on the model at hand, because not every
architecture keeps samples apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .sample import IGNORED, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pack = list[Sample]
"""Samples that share one sequence. Without packing: one sample."""

GRANULE = 64
"""Batches are padded to a multiple of this many tokens, so that few lengths occur."""


def pack(
    lengths: Iterable[int], limit: int, most: int | None = None, window: int | None = None
) -> list[list[int]]:
    """Fill sequences of ``limit`` tokens with whole samples, best fit first; returns their indices.

    Longest first, each sample goes where it leaves the least room (Johnson's best-fit decreasing:
    at most 11/9 of the fewest possible sequences). A million samples take a second or two, because
    sequences with equal room are one entry in the search. ``most`` limits the samples per sequence;
    with ``window``, so many samples are packed at a time, in their order. Raises a ValueError if a
    sample is longer than ``limit``.
    """
    sizes = np.asarray(list(lengths) if not isinstance(lengths, np.ndarray) else lengths, np.int64)
    if sizes.size and int(sizes.max()) > limit:
        raise ValueError(f"a sample of {int(sizes.max())} tokens does not fit into {limit}")
    step = window or max(1, sizes.size)
    groups: list[list[int]] = []
    for begin in range(0, sizes.size, step):
        groups += _best_fit(sizes[begin : begin + step], begin, limit, most or sizes.size)
    return groups


def _best_fit(sizes: np.ndarray, first: int, limit: int, most: int) -> list[list[int]]:
    """Pack one window, whose samples are numbered from ``first``."""
    order = np.argsort(-sizes, kind="stable")
    groups: list[list[int]] = []
    open_: dict[int, list[list[int]]] = {}  # tokens left -> the sequences with so much room
    rooms: list[int] = []  # the keys of `open_`, sorted
    for index, size in zip((order + first).tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            stack = open_[room]
            group = stack.pop()
            if not stack:
                del open_[room], rooms[at]
            group.append(index)
        else:
            room, group = limit, [index]
            groups.append(group)
        rest = room - size
        if rest and len(group) < most:
            if rest in open_:
                open_[rest].append(group)
            else:
                open_[rest] = [group]
                insort(rooms, rest)
    return groups


class Packs(Sequence[Pack]):
    """A map-style dataset of packs, read on access; ``groups`` is the result of ``pack``."""

    def __init__(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> None:
        self.samples, self.groups = samples, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Packs(self.samples, self.groups[index])
        return [self.samples[i] for i in self.groups[index]]


def collate(
    packs: Sequence[Sequence[Sample]], pad_id: int, packing: bool, length: int, full: bool = False
) -> dict[str, Tensor]:
    """Make one batch.

    With ``packing`` the batch has positions and no mask; without, a mask, and each pack has one
    sample. ``full`` fills every sequence up to ``length``.

    Returns:
        ``input_ids`` and ``labels`` (B, T), and ``position_ids`` (B, T) or ``attention_mask``
        (B, T), all int64. T is a multiple of ``GRANULE``, or ``length`` where that is less.
    """
    import torch

    longest = max(sum(len(s.input_ids) for s in p) for p in packs)
    width = max(longest, length if full else min(length, -(-longest // GRANULE) * GRANULE))
    ids, labels, positions, mask = [], [], [], []
    for samples in packs:
        tokens = [t for s in samples for t in s.input_ids]
        rest = width - len(tokens)
        ids.append(tokens + [pad_id] * rest)
        labels.append([t for s in samples for t in s.labels] + [IGNORED] * rest)
        # the padding is a separate sample, which nothing attends to
        sizes = [*(len(s.input_ids) for s in samples), rest]
        positions.append([i for size in sizes for i in range(size)])
        mask.append([1] * len(tokens) + [0] * rest)
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if packing:
        batch["position_ids"] = torch.tensor(positions)
    else:
        batch["attention_mask"] = torch.tensor(mask)
    return batch


def count(packs: Iterable[Sequence[Sample]]) -> tuple[int, int]:
    """How many tokens ``packs`` hold, and how many of them are trained."""
    tokens = trained = 0
    for samples in packs:
        tokens += sum(len(s.input_ids) for s in samples)
        trained += sum(s.trained for s in samples)
    return tokens, trained


SHORT, LONG = (9, 7), (67, 9)
"""Tokens of the two samples of a pack that is tried: more than a convolution is wide, and more than
a chunk of a scan has."""


def leaks(model: Any, vocab_size: int, device: torch.device, sizes: tuple[int, int] = SHORT) -> str:
    """What lets a sample in a pack see another, by its name; empty where nothing does.

    Two packs differ only in their first sample; the logits of the second must be the same, bit for
    bit, because masked scores contribute exact zeros, and the gradient of each sample's logits with
    respect to the embeddings of the other one must be zero. What is named is the innermost module
    whose inputs agree and whose outputs do not. Where the model looks no token up in its table, the
    gradients cannot be tried.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first = sizes[0]
    ids = torch.randint(vocab_size, (2, sum(sizes)), generator=generator)
    ids[1, first:] = ids[0, first:]
    ids[1, :first] = (ids[0, :first] + 1) % vocab_size
    positions = torch.cat([torch.arange(n) for n in sizes]).expand(2, -1)
    batch = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    training = [m for m in model.modules() if m.training]
    with torch.random.fork_rng():
        try:
            model.eval()  # a dropout would draw other numbers for each row
            with torch.no_grad():
                logits = model(**batch).logits
                if not torch.equal(logits[0, first:], logits[1, first:]):
                    return _leaking_module(model, batch, first)
            model.train()  # which may run other code
            one = {name: t[:1] for name, t in batch.items()}
            return "its backward pass" if _gradient_leaks(model, one, first) else ""
        finally:
            model.eval()
            for m in training:
                m.training = True


def _gradient_leaks(model: Any, batch: dict[str, Tensor], length: int) -> bool:
    """Whether the logits of a sample have a gradient in the embeddings of the other one."""
    from ...compiler.regions import input_embeddings

    table = input_embeddings(model)
    if table is None:
        return False
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        first, second = slice(0, length), slice(length, None)
        grads = [_gradients(model, batch, table, own) for own in (second, first)]
    finally:
        for p in trained:
            p.requires_grad_(True)
    others = zip(grads, (first, second), strict=True)
    return any(bool((g[:, other] != 0).any()) for each, other in others for g in each)


def _gradients(model: Any, batch: dict[str, Tensor], table: Any, own: slice) -> list[Tensor]:
    """The gradients of one sample's logits with respect to what ``table`` returns at each call."""
    import torch

    embedded = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = table.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            logits = model(**batch).logits
    finally:
        handle.remove()
    if not logits.requires_grad:
        return []
    upstream = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).to(logits.dtype)
    # by ``backward``: reentrant checkpoints do not go with ``autograd.grad``
    (logits[:, own] * upstream).sum().backward()
    # of whole rows: a model may look up single tokens, too
    rows = batch["input_ids"].shape
    return [t.grad for t in embedded if t.grad is not None and t.shape[:2] == rows]


def _leaking_module(model: Any, batch: dict[str, Tensor], first: int) -> str:
    """The first module to return whose inputs agree in the second sample, and outputs differ."""
    import torch

    length = batch["input_ids"].shape[1]

    def differ(values: Any) -> bool:
        """Whether tensors differ between the two packs, in their second sample."""
        if isinstance(values, dict):
            values = tuple(values.values())
        if isinstance(values, (tuple, list)):
            return any(map(differ, values))
        if not isinstance(values, torch.Tensor) or values.dim() < 2 or values.shape[0] != 2:
            return False
        time = next((d for d in range(1, values.dim()) if values.shape[d] == length), None)
        if time is None or not values.is_floating_point():
            return False
        rows = values.narrow(time, first, length - first)
        return not torch.equal(rows[0], rows[1])

    names = {m: name for name, m in model.named_modules()}
    found: list[str] = []
    handles: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not found and not differ((args, kwargs)) and differ(output):
            found.append(f"{names[module]} ({type(module).__name__})")

    try:
        handles += (
            m.register_forward_hook(hook, with_kwargs=True) for m in names if m is not model
        )
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else type(model).__name__
