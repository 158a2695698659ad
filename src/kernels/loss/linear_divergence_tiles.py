"""``linear_divergence`` in plain PyTorch: tiles of rows of both heads, strips of tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .head_tiles import accumulate, project, project_back, row_strips, row_tiles

Head = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows (N, hidden), weight (vocabulary, hidden), and bias (vocabulary,) or None.

A teacher without a weight is its log-probabilities (N, vocabulary).
"""


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, other_x: Tensor, other_weight: Tensor | None,
    other_bias: Tensor | None, targets: Tensor | None, kind: str, beta: float, temperature: float,
    ignore_index: int, made: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The divergences (N,), in fp32 or fp64, and if ``made`` their gradients for x.

    The gradient is of each row's value for its x, times the temperature: (N, hidden) in x's dtype,
    or without rows. Arguments are those of ``linear_divergence``, with rows in one dimension.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    student, teacher = (x, weight, bias), (other_x, other_weight, other_bias)
    values = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    term = x.new_zeros(x.shape if made else (0, x.shape[1]))
    for rows, logits, teacher_logits in _each_tile(student, teacher, targets, ignore_index, 4):
        part_values = torch.empty(logits.shape[0], dtype=wide, device=x.device)
        for part in row_strips(*logits.shape):
            s = _log_softmax(logits[part], temperature, wide)
            t, mass = _teacher(teacher_logits[part], other_weight, temperature, wide)
            part_values[part], slope = _divergence(s, t, mass, kind, beta, made)
            if slope is not None:
                logits[part] = slope
        values[rows] = part_values
        if made:
            term[rows] = project_back(logits, weight)
    return values, term


def differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, other_x: Tensor,
    other_weight: Tensor, other_bias: Tensor | None, targets: Tensor | None, kind: str, beta: float,
    temperature: float, ignore_index: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, ``weight`` and ``bias``, from one more projection of both heads.

    ``grad`` (N,) is of the values of ``compute``, ``wanted`` says which gradients are computed. dx
    (N, hidden) and dweight (vocabulary, hidden) have x's dtype, dbias (vocabulary,) is fp32 or
    fp64. A gradient that is not wanted has no rows.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    vocabulary, hidden = weight.shape
    student, teacher = (x, weight, bias), (other_x, other_weight, other_bias)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dbias = torch.zeros(vocabulary if wanted[2] else 0, dtype=wide, device=x.device)
    dweight: Tensor | None = None
    tiles = _each_tile(student, teacher, targets, ignore_index, 1 if wanted[1] else 4)
    for rows, logits, teacher_logits in tiles:
        upstream = (grad[rows] / temperature).unsqueeze(1)
        for part in row_strips(*logits.shape):
            s = _log_softmax(logits[part], temperature, wide)
            t, mass = _teacher(teacher_logits[part], other_weight, temperature, wide)
            _, slope = _divergence(s, t, mass, kind, beta, True)
            assert slope is not None
            slope.mul_(upstream[part])
            if wanted[2]:
                dbias += slope.sum(0)
            logits[part] = slope
        if wanted[0]:
            dx[rows] = project_back(logits, weight)
        if wanted[1]:
            dweight = accumulate(dweight, logits, x[rows], wide)
    if dweight is None:
        dweight = x.new_zeros((vocabulary if wanted[1] else 0, hidden))
    return dx, dweight.to(x.dtype), dbias


def _each_tile(
    student: Head, teacher: Head, targets: Tensor | None, ignore_index: int, part: int
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Each tile: the places of its rows, the student's logits, the teacher's."""
    counted: Tensor | None = None
    assert student[1] is not None
    count, vocabulary = student[0].shape[0], student[1].shape[0]
    if targets is not None:
        places = (targets != ignore_index).nonzero().squeeze(1)
        counted, count = (None if places.numel() == count else places), places.numel()
    row_bytes = vocabulary * (student[0].element_size() + teacher[0].element_size())
    tiles = row_tiles(count, row_bytes, part)
    height = max((stop - start for start, stop in tiles), default=0)
    # one buffer for all: fresh memory of this size would be faulted in page by page, tile by tile
    buffers = [
        x.new_empty(0 if weight is None else height, vocabulary)
        for x, weight, _ in (student, teacher)
    ]
    for start, stop in tiles:
        rows = slice(start, stop) if counted is None else counted[start:stop]
        logits, teacher_logits = (
            x[rows] if weight is None else project(x[rows], weight, bias, buffer[: stop - start])
            for (x, weight, bias), buffer in zip((student, teacher), buffers, strict=True)
        )
        yield rows, logits, teacher_logits


def _teacher(
    strip: Tensor, weight: Tensor | None, temperature: float, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    # The teacher's log-probabilities, and the sums of its probabilities where they may not be 1.
    # Those that are passed in are used as they are: rounded, or not made by a softmax at all.
    if weight is not None:
        return _log_softmax(strip, temperature, wide), None
    logprobs = strip.to(wide, copy=True)
    return logprobs, logprobs.exp().sum(1, keepdim=True)


def _log_softmax(strip: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    f = strip.to(wide)
    return torch.log_softmax(f if temperature == 1.0 else f / temperature, 1)


def _divergence(
    student: Tensor, teacher: Tensor, mass: Tensor | None, kind: str, beta: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergences (R,) of log-probabilities (R, V), and the gradient of the student's logits.

    With ``s`` the student's probabilities, ``t`` the teacher's, ``m = (1 - beta)·s + beta·t``:
    ``forward_kl = Σ t·log(t/s)``, its gradient ``s·mass - t``, where ``mass = Σt`` is 1 if it is
    None; ``reverse_kl = Σ s·log(s/t)``, its gradient ``s·(log(s/t) - reverse_kl)``;
    ``jsd = beta·Σ t·log(t/m) + (1 - beta)·Σ s·log(s/m)``, its gradient
    ``(1 - beta)·s·(log(s/m) - Σ s·log(s/m))``.
    """
    if kind == "forward_kl":
        t = teacher.exp()
        values = teacher.sub_(student).mul_(t).sum(1)
        if not gradient:
            return values, None
        s = student.exp_()
        return values, (s if mass is None else s.mul_(mass)).sub_(t)
    s = student.exp()
    if kind == "reverse_kl":
        ratio = student.sub_(teacher)
        values = (s * ratio).sum(1)
        return values, s.mul_(ratio.sub_(values.unsqueeze(1))) if gradient else None
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    ratio = student.sub_(mixture)
    reverse_kl = (s * ratio).sum(1)
    t = teacher.exp()
    values = (1.0 - beta) * reverse_kl + beta * t.mul_(teacher.sub_(mixture)).sum(1)
    if not gradient:
        return values, None
    return values, s.mul_(ratio.sub_(reverse_kl.unsqueeze(1))).mul_(1.0 - beta)
