"""When a device has nothing to do in a training step: the gaps between its kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHORTEST = 5.0
"""Microseconds from which on a gap is one: between two kernels of a full queue lie one or two."""


class Span(NamedTuple):
    """What the device did, from when to when in microseconds."""

    start: float
    end: float
    name: str


def idle_gaps(spans: Sequence[Span], most: int = 5) -> dict[str, Any]:
    """Sum up when none of ``spans`` runs, from the first one's start to the last one's end.

    Args:
        spans: in any order; they may overlap (streams) or lie within each other.
        most: of the longest gaps to name.

    Returns:
        ``busy_ms``, ``idle_ms``, ``gaps`` (their number), ``kernels`` (of spans) and ``longest``:
        ``{"us", "after", "before"}`` for each of the longest gaps.
    """
    ordered = sorted(spans)
    found: list[tuple[float, str, str]] = []
    idle, last = 0.0, ordered[0] if ordered else Span(0.0, 0.0, "")
    for span in ordered:
        gap = span.start - last.end
        if gap > 0:
            idle += gap
        if gap >= SHORTEST:
            found.append((gap, last.name, span.name))
        last = max(last, span, key=lambda s: s.end)
    whole = last.end - ordered[0].start if ordered else 0.0
    longest = sorted(found, reverse=True)[:most]
    return {
        "busy_ms": (whole - idle) / 1e3,
        "idle_ms": idle / 1e3,
        "gaps": len(found),
        "kernels": len(spans),
        "longest": [{"us": us, "after": a, "before": b} for us, a, b in longest],
    }


def by_name(spans: Sequence[Span], most: int = 80) -> list[dict[str, Any]]:
    """The kernels that take the longest: ``name``, ``count`` and ``us``, of all calls together."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        found[span.name[:160]].append(span.end - span.start)
    rows = [{"name": k, "count": len(v), "us": round(sum(v), 1)} for k, v in found.items()]
    return sorted(rows, key=lambda row: -row["us"])[:most]


def profile(call: Callable[[], Any], device: str, trace: Path | None = None) -> dict[str, Any]:
    """``idle_gaps`` and ``by_name`` of ``call``, which waits for its work; on a CPU, of operators.

    Args:
        call: what to profile.
        device: ``"cuda"`` or ``"cpu"``.
        trace: a file for the whole trace, for Perfetto or ``chrome://tracing``.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        call()
    if trace is not None:
        found.export_chrome_trace(str(trace))
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    spans = [
        Span(e.time_range.start, e.time_range.end, e.name)
        for e in found.events()
        if e.device_type == wanted
    ]
    return idle_gaps(spans) | {"by_name": by_name(spans)}
