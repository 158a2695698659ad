"""Do samples see each other: those that share a row, and rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..rewrite.tolerance import FACTOR, unit
from .bench import Bench, cast_to
from .findings import Finding
from .reference import Batch

PACK_CHECKS = ("packing", "recurrent-state")


class Sample(NamedTuple):
    """Where one sample of a batch is."""

    row: int
    start: int
    stop: int


def samples_of(batch: Batch) -> list[Sample]:
    """The samples of each row, where position_ids, seq_idx or cumulated lengths tell them apart."""
    ids: Any = batch["input_ids"]
    rows, length = ids.shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, 0] = True
    positions, index = batch.get("position_ids"), batch.get("seq_idx")
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
                found.append(Sample(row, start, stop))
    return found


_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")


def findings(bench: Bench, batch: Batch) -> Iterator[Finding]:
    """Change one sample's tokens, and see whether what is computed for others changes."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        yield from _skipped("the batch has no input_ids (rows, tokens)")
        return
    samples = samples_of(batch)
    packed = len({s.row for s in samples}) < len(samples)
    if len(samples) < 2:
        yield from _skipped("the slice has one sample only" if samples else "the rows are padded")
        return
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "num_items_in_batch")}
    changed, first = _changed(inputs, samples, packed)
    here = [s for s in samples if s != first and (s.row == first.row or not packed)]
    try:
        before, after = (_logits(bench, each) for each in (inputs, changed))
    except _NoLogits as error:
        yield from _skipped(str(error))
        return
    exact = bench.plain.forward(inputs).logits
    rounding = _distance(bench.plain.forward(inputs, "own").logits, exact, here)
    moved = _distance(after, before, here)
    allowed = FACTOR * rounding + unit(bench.plain.dtype)
    figures = {"moved": moved, "allowed": allowed, "samples": len(samples)}
    what = "samples of a row" if packed else "rows"
    if moved <= allowed:
        for check in PACK_CHECKS:
            yield Finding(check, "pass", f"{what} do not see each other", figures=figures)
        return
    plain = _distance(bench.plain.forward(changed).logits, exact, here)
    by_plain = plain > FACTOR * rounding + unit(bench.plain.dtype)
    recurrent, where = _mixer(bench, inputs, changed, here) if by_plain else (False, "")
    words = (
        f"the logits of other {what} move by {moved:.1e} when the first one's tokens are changed, "
        f"and rounding moves them by {allowed:.1e}"
    )
    words += f"; it begins in {where}" if where else ""
    words += "" if by_plain else "; the plain model keeps them apart"
    failed = "recurrent-state" if recurrent else "packing"
    for check in PACK_CHECKS:
        if check == failed:
            yield Finding(check, "fail", words, (where,) if where else (), figures=figures)
        else:
            yield Finding(check, "skipped", f"samples see each other: see {failed}")


def _skipped(reason: str) -> Iterator[Finding]:
    for check in PACK_CHECKS:
        yield Finding(check, "skipped", reason)


class _NoLogits(Exception):
    pass


def _logits(bench: Bench, inputs: Batch) -> Tensor:
    with torch.no_grad(), cast_to(inputs, bench.autocast):
        outputs: Any = bench.model(**inputs)
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise _NoLogits("the model returns no logits (rows, tokens, words)")
    return logits.detach()


def _changed(
    inputs: Batch, samples: Sequence[Sample], packed: bool
) -> tuple[dict[str, Any], Sample]:
    """The inputs with the tokens of a sample reversed and moved on, and that sample."""
    rows = [s.row for s in samples]
    first = (
        next((s for s in samples if rows.count(s.row) > 1), samples[0]) if packed else samples[0]
    )
    ids = inputs["input_ids"].clone()
    part = ids[first.row, first.start : first.stop]
    # other tokens of the same batch: special ones stay few
    ids[first.row, first.start : first.stop] = torch.where(
        part == part.flip(0), part.roll(1), part.flip(0)
    )
    return {**inputs, "input_ids": ids}, first


def _distance(a: Tensor, b: Tensor, samples: Sequence[Sample]) -> float:
    off = size = 0.0
    for row, start, stop in samples:
        x, y = a[row, start:stop].double(), b[row, start:stop].double()
        off, size = off + float((x - y).square().sum()), size + float(y.square().sum())
    return (off / size) ** 0.5 if size else 0.0


# --- where it begins ------------------------------------------------------------------------------


class _SeesAttention(TorchFunctionMode):
    """Notes in which modules a softmax over as many values as there are tokens is computed."""

    def __init__(self, stack: list[str], tokens: int) -> None:
        super().__init__()
        self.stack, self.tokens, self.paths = stack, tokens, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        over_tokens = name == "softmax" and args[0].shape[-1] == self.tokens
        if over_tokens or name == "scaled_dot_product_attention":
            self.paths |= set(self.stack)
        return func(*args, **(kwargs or {}))


def _mixer(
    bench: Bench, inputs: Batch, changed: Batch, samples: Sequence[Sample]
) -> tuple[bool, str]:
    """Whether a recurrent layer lets samples see each other first, in the plain model; its path."""
    outputs: list[dict[str, Tensor]] = []
    stack: list[str] = []
    rows, tokens = inputs["input_ids"].shape
    sees = _SeesAttention(stack, tokens)
    handles = []
    for path, module in bench.plain.model.named_modules():
        if not path:
            continue

        def enter(_: nn.Module, args: Any, path: str = path) -> None:
            stack.append(path)

        def leave(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            stack.remove(path)
            value = output[0] if isinstance(output, tuple) and output else output
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (rows, tokens):
                outputs[-1][path] = value.detach()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with sees:
            for each in (inputs, changed):
                outputs.append({})
                bench.plain.forward(each)
    finally:
        for handle in handles:
            handle.remove()
    before, after = outputs
    tolerance = 100 * unit(bench.plain.exact)
    for path, value in after.items():  # in the order in which they ended: inner ones first
        if path in before and _distance(value, before[path], samples) > tolerance:
            return _mixer_of(bench.plain.model, path, sees.paths)
    return False, ""


def _mixer_of(model: nn.Module, path: str, attending: set[str]) -> tuple[bool, str]:
    """Whether the mixer of tokens that ``path`` belongs to is none that attends; and its path."""
    begin = path
    while path and not path.rpartition(".")[2].isdigit():
        if path in attending:
            return False, path
        module = model.get_submodule(path)
        if any(isinstance(m, nn.Conv1d) for m in (module, *module.children())):
            return True, path
        path = path.rpartition(".")[0]
    return path not in attending, begin
