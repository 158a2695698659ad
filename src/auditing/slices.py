"""The part of a batch that is compared with the plain model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Batch


def slice_of(batch: Batch, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """At least two rows of ``batch`` if it has them, with about ``tokens`` tokens; and the facts.

    Rows with few trained tokens are as welcome as those with many: the two that differ most come
    first. Of a row that is too long, the part around the last border of two samples with trained
    tokens before it is taken, or the part that ends with the last trained token. A batch that has
    anything but tensors of (rows, tokens) is taken whole.
    """
    ids = batch.get("input_ids")
    labels = batch.get("labels")
    whole = dict(batch)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return whole, {"slice": "the whole batch"}
    rows, length = ids.shape
    facts = {"rows": rows, "tokens": rows * length, "slice": "the whole batch"}
    by_token = {
        k: v for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:2] == ids.shape
    }
    lengths = [k for k in _CUMULATED if isinstance(batch.get(k), Tensor) and rows == 1]
    others = [
        k for k, v in batch.items()
        if isinstance(v, Tensor) and k not in (*by_token, *lengths) and v.numel() != 1
    ]  # fmt: skip
    if rows * length <= tokens or others or not isinstance(labels, Tensor):
        return whole, facts
    if labels.shape != ids.shape:
        return whole, facts
    trained = (labels != -100).sum(1)
    order = torch.argsort(trained).tolist()
    order = [r for r in order if int(trained[r])] or order
    picked = [order[0], order[-1]] if len(order) > 1 else order[:1]
    span = max(8, tokens // len(picked))
    span = min(span, length)
    samples = samples_of(batch)
    starts = [_start_of(row, (labels[row] != -100).cpu(), span, samples) for row in picked]
    for name, value in by_token.items():
        parts = [value[r, s : s + span] for r, s in zip(picked, starts, strict=True)]
        whole[name] = torch.stack(parts)
    for name in lengths:
        whole[name] = _cut(batch[name], starts[0], span)
        longest = int(whole[name].diff().max())
        whole |= {k: longest for k in _OF_PACKS if isinstance(batch.get(k), int)}
    _count_anew(whole)
    places = (f"{s} to {s + span} of row {r}" for r, s in zip(picked, starts, strict=True))
    facts |= {
        "rows": len(picked), "tokens": len(picked) * span,
        "slice": f"tokens {' and '.join(places)}, of {rows} rows of {length} tokens",
    }  # fmt: skip
    return whole, facts


def _start_of(row: int, on: Tensor, span: int, samples: list[SampleSpan]) -> int:
    """Where the part of a row begins that has ``span`` tokens; ``on``: those that are trained."""
    length = len(on)
    stop = int(on.nonzero()[-1]) + 1 if bool(on.any()) else span
    trained = [s for s in samples if s.row == row and bool(on[s.start + 1 : s.stop].any())]
    for before, after in pairwise(trained):  # the padding of a pack is a sample, and not trained
        # the first token of the part has none before it to be predicted from
        if before.stop == after.start and bool(on[: before.stop][-(span // 2) + 1 :].any()):
            stop = after.start + span - span // 2
    return max(0, min(stop, length) - span)


def _cut(lengths: Tensor, start: int, span: int) -> Tensor:
    """Cumulated lengths of the samples of a part of a row."""
    inside: Tensor = torch.unique_consecutive((lengths - start).clamp(0, span))
    return inside


def _count_anew(part: dict[str, Any]) -> None:
    """Let ``num_items_in_batch``, where it is given, be the number of the part's trained tokens."""
    number, labels = part.get("num_items_in_batch"), part.get("labels")
    if number is None or not isinstance(labels, Tensor):
        return
    trained = max(1, int((labels[..., 1:] != -100).sum()))
    part["num_items_in_batch"] = (
        torch.full_like(number, trained) if isinstance(number, Tensor) else type(number)(trained)
    )


def has_media(batch: Batch) -> bool:
    """Whether tokens of a batch stand for images or sounds, whose features are not by token."""
    shape = batch["input_ids"].shape
    return any(
        isinstance(v, Tensor) and v.is_floating_point() and v.numel() != 1
        and v.shape[:2] != shape and name != "attention_mask"  # which may be of pairs of tokens
        for name, v in batch.items()
    )  # fmt: skip


def first_rows(batch: Batch, number: int) -> dict[str, Any] | None:
    """The first rows of a batch; None if it has no more, or is not in rows."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) <= number or has_media(batch):
        return None
    part = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            if len(value) != len(ids):
                return None
            part[name] = value[:number]
    _count_anew(part)
    labels = part.get("labels")
    return part if isinstance(labels, Tensor) and bool((labels != -100).any()) else None


def first_tokens(batch: Batch, number: int) -> dict[str, Any] | None:
    """The first tokens of each row; None if there are no more, or none of these are trained."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] <= number:
        return None
    part = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            if value.shape[:2] != ids.shape:
                return None
            part[name] = value[:, :number]
    _count_anew(part)
    labels = part.get("labels")
    return part if isinstance(labels, Tensor) and bool((labels[:, 1:] != -100).any()) else None


class SampleSpan(NamedTuple):
    """Where one sample of a batch is."""

    row: int
    start: int
    stop: int


def samples_of(batch: Batch) -> list[SampleSpan]:
    """The samples of each row, where position_ids, seq_idx or cumulated lengths tell them apart."""
    ids: Any = batch["input_ids"]
    rows, length = ids.shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, 0] = True
    positions, index = batch.get("position_ids"), batch.get("seq_idx")
    if isinstance(positions, Tensor) and positions.shape == (4, *ids.shape):
        positions = positions[0]  # the others are time, height and width
    lengths = next((batch[k] for k in _LENGTHS if isinstance(batch.get(k), Tensor)), None)
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        starts[:, 1:] |= (positions[:, 1:] != positions[:, :-1] + 1).cpu()
    elif isinstance(index, Tensor) and index.shape == ids.shape:
        starts[:, 1:] |= (index[:, 1:] != index[:, :-1]).cpu()
    elif lengths is not None and rows == 1:
        starts[0, lengths[:-1].cpu().long().clamp(max=length - 1)] = True
    mask = batch.get("attention_mask")
    there = torch.ones(rows, length, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        there = mask.bool().cpu()
    found = []
    for row in range(rows):
        at = [*starts[row].nonzero().flatten().tolist(), length]
        for start, stop in pairwise(at):
            if stop - start > 1 and bool(there[row, start:stop].all()):
                found.append(SampleSpan(row, start, stop))
    return found


_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")
_CUMULATED = (*_LENGTHS, "cu_seq_lens_k", "cu_seqlens_k")


def alone(batch: Batch, sample: SampleSpan) -> dict[str, Any]:
    """One sample of a pack as a batch: positions from 0, and nothing that tells samples apart."""
    row, start, stop = sample
    shape = batch["input_ids"].shape
    part = {
        name: value[row : row + 1, start:stop]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.shape[:2] == shape
    }
    for name in ("attention_mask", "seq_idx"):
        part.pop(name, None)
    if isinstance(positions := part.get("position_ids"), Tensor):
        part["position_ids"] = positions - positions[:, :1]
    others = {k: v for k, v in batch.items() if not isinstance(v, Tensor) and k not in _OF_PACKS}
    return {**others, **part}


_OF_PACKS = ("max_length_q", "max_length_k", "max_seqlen", "max_seqlens")


def moved_on(batch: Batch, by: int) -> dict[str, Any] | None:
    """The batch with each row's tokens at other places; None if they stand for other media."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    others = any(isinstance(v, Tensor) and v.is_floating_point() for v in batch.values())
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or others:
        return None
    if ids.shape != labels.shape:
        return None
    moved = ids.roll(by, -1)
    return {**batch, "input_ids": moved, "labels": torch.where(labels == -100, labels, moved)}


def rows_of_one_sample(batch: Batch) -> int:
    """How many rows of a batch that is not packed are padded; 0 if not even half of them are."""
    mask = batch.get("attention_mask")
    marked = ("position_ids", "seq_idx", *_LENGTHS)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or any(name in batch for name in marked):
        return 0
    padded = int((mask == 0).any(1).sum())
    return padded if 2 * padded >= len(mask) else 0
