"""Do samples see each other: those that share a row, and rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.tolerance import budget, unit
from .bench import Bench, cast_to
from .findings import AuditFinding
from .losses import of_model
from .reference import AuditStep, Batch
from .slices import SampleSpan, alone, has_media, samples_of

PACK_CHECKS = ("packing", "recurrent-state")


@dataclass(frozen=True)
class Leaks:
    """How far the logits of other samples move when the first one's tokens are changed.

    Attributes:
        moved: in the audited model; ``by_plain`` in the plain one; ``allowed`` by rounding.
        apart: how far the last sample of a pack is from itself alone; None: it was not asked.
        packed: whether samples share rows.
        where: the module in which the plain model lets samples see each other.
        recurrent: whether that is a recurrent layer or a convolution.
    """

    moved: float
    by_plain: float
    allowed: float
    apart: float | None
    packed: bool
    where: str = ""
    recurrent: bool = False

    @property
    def only_plain(self) -> bool:
        """Whether the plain model is no measure: it alone mixes the samples of a pack."""
        return self.packed and self.by_plain > self.allowed >= self.moved


def look(bench: Bench, batch: Batch, exact: AuditStep, eager: AuditStep) -> Leaks | str:
    """Change one sample's tokens, and see what moves; or why that cannot be asked.

    ``exact`` and ``eager`` are the plain model's steps of ``batch``.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return "the batch has no input_ids (rows, tokens)"
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and len(labels) != len(ids):  # codebooks of sounds
        return "several rows of input_ids are one sample"
    samples = samples_of(batch)
    packed = len({s.row for s in samples}) < len(samples)
    if len(samples) < 2:
        return "the slice has one sample only" if samples else "the rows are padded"
    changed, first = _changed(batch, samples, packed)
    here = [s for s in samples if s != first and (s.row == first.row or not packed)]
    try:
        before, after = (_logits(bench, each) for each in (batch, changed))
        if bench.loss is of_model:
            truth, rounded = _of(exact), _of(eager)
        else:  # which may call the model several times, or with parts
            truth = _of(bench.plain.forward(batch))
            rounded = _of(bench.plain.forward(batch, "own"))
        plain = _distance(_of(bench.plain.forward(changed)), truth, here)
    except _NoLogits as error:
        return str(error)
    allowed = budget(_distance(rounded, truth, here), unit(bench.plain.dtype))
    apart = None
    if packed and isinstance(batch.get("position_ids"), Tensor) and not has_media(batch):
        last = here[-1]
        span = [SampleSpan(0, 0, last.stop - last.start)]
        part = before[last.row : last.row + 1, last.start : last.stop]
        by_itself = alone(batch, last)
        apart = _distance(part, _of(bench.plain.forward(by_itself)), span)
        if apart > allowed:  # or all that the audited model computes is wrong
            apart = _distance(_logits(bench, by_itself), part, span)
    recurrent, where = _mixer(bench, batch, changed, here) if plain > allowed else (False, "")
    moved = _distance(after, before, here)
    return Leaks(moved, plain, allowed, apart, packed, where, recurrent)


def findings(leaks: Leaks | str) -> Iterator[AuditFinding]:
    """The answers about samples that see each other."""
    if isinstance(leaks, str):
        for check in PACK_CHECKS:
            yield AuditFinding(check, "skipped", leaks)
        return
    figures = {"moved": leaks.moved, "apart": leaks.apart, "allowed": leaks.allowed}
    what = "samples of a row" if leaks.packed else "rows"
    words, failed, where = "", "packing", ""
    if leaks.moved > leaks.allowed:
        words = (
            f"the logits of other {what} move by {leaks.moved:.1e} when the first one's tokens are "
            f"changed, and rounding moves them by {leaks.allowed:.1e}"
        )
        if leaks.by_plain <= leaks.allowed:
            words += "; the plain model keeps them apart"
        else:
            where = leaks.where
            failed = "recurrent-state" if leaks.recurrent else "packing"
            words += f"; it begins in {where}" if where else ""
    elif leaks.apart is not None and leaks.apart > 4 * leaks.allowed:
        words = (
            f"a sample's logits in the pack and alone differ by {leaks.apart:.1e}, and rounding "
            f"makes {leaks.allowed:.1e}: it is at other positions, or sees others' tokens"
        )
    for check in PACK_CHECKS:
        if not words:
            yield AuditFinding(check, "pass", f"{what} do not see each other", figures=figures)
        elif check == failed:
            yield AuditFinding(check, "fail", words, (where,) if where else (), figures=figures)
        else:
            yield AuditFinding(check, "skipped", f"samples see each other: see {failed}")


_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")


class _NoLogits(Exception):
    pass


def _logits(bench: Bench, inputs: Batch) -> Tensor:
    # with labels and gradients, as they are trained: without them, graphs of fusewright are others
    with torch.enable_grad(), cast_to(inputs, bench.autocast):
        outputs = bench.model(**inputs)
        if getattr(outputs, "logits", None) is None:
            outputs = bench.model(**{k: v for k, v in inputs.items() if k not in _OF_THE_LOSS})
        return _of(outputs)


def _of(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise _NoLogits("the model returns no logits (rows, tokens, words)")
    return logits.detach()


def _changed(
    inputs: Batch, samples: Sequence[SampleSpan], packed: bool
) -> tuple[dict[str, Any], SampleSpan]:
    """The inputs with the tokens of a sample reversed and moved on, and that sample.

    Where some stand for images, only those that are trained are exchanged.
    """
    rows = [s.row for s in samples]
    first = (
        next((s for s in samples if rows.count(s.row) > 1), samples[0]) if packed else samples[0]
    )
    ids, labels = inputs["input_ids"].clone(), inputs.get("labels")
    places = torch.arange(first.start, first.stop, device=ids.device)
    if has_media(inputs) and isinstance(labels, Tensor):
        places = places[labels[first.row, places] != -100]
    part = ids[first.row, places]
    # other tokens of the same batch: special ones stay few
    ids[first.row, places] = torch.where(part == part.flip(0), part.roll(1), part.flip(0))
    return {**inputs, "input_ids": ids}, first


def _distance(a: Tensor, b: Tensor, samples: Sequence[SampleSpan]) -> float:
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
    bench: Bench, inputs: Batch, changed: Batch, samples: Sequence[SampleSpan]
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
