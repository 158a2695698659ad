"""Each fused op against its own reference: speed and memory, forward and with backward.

    python benchmarks/ops.py --device cpu --ops rms_norm,glu --csv FILE

Providers: ``reference`` (the op's definition, eager), ``compile`` (``torch.compile`` of that),
``fusewright`` (the op), ``fusewright-compiled`` (the op traced through Inductor, as inside a
compiled block) and ``rivals`` (what libraries have for the call: ``competitors.py``). Samples of
the providers alternate. On a GPU its own time and the host's are
measured apart. An op whose kernel cannot be launched has an error, not the time of its plain form.
On a GPU an op's candidates are measured first: ``fusewright`` is the fastest, ``choices`` has all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from competitors import RIVALS
from environment import describe, write_whole
from fusewright.kernels.choice import choices
from fusewright.kernels.cost import Cost
from fusewright.kernels.fallback import no_fallback
from fusewright.kernels.op import Op
from fusewright.kernels.tolerance import errors
from fusewright.rewrite.op_table import OPS
from op_cases import CASES, Case, Maker, op_of
from shapes import op_shapes
from sticky import broken_context

MB = 1 << 20
RIVALS_TOO = "rivals"
PROVIDERS: dict[str, Callable[[Op], Callable[..., Any]]] = {
    "reference": lambda op: op.reference,
    "compile": lambda op: torch.compile(op.reference, dynamic=False),
    "fusewright": lambda op: op.call,
    "fusewright-compiled": lambda op: torch.compile(op.call, dynamic=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 when every provider ran every op that its device has an implementation of."""
    ops = {op.name: op for op in OPS}
    options = _parse(arguments, sorted(CASES))
    dtype = getattr(torch, options.dtype)
    environment = describe()
    environment |= {f"{name}_version": v for name, v in environment.pop("versions").items()}
    rows = read_csv(options.csv) if options.resume else []
    done = {(row["shape"], row["op"]) for row in rows}
    end = time.monotonic() + options.within
    for label, shape in op_shapes(options.device, options.quick, options.smallest).items():
        maker = Maker(shape, dtype, options.device, options.train_weights)
        for name in options.ops:
            if (label, name) in done or time.monotonic() > end:
                continue
            op, case = ops[op_of(name)], maker.make(name)
            about = {"op": name, "shape": label, "dtype": options.dtype}
            about["choices"] = (
                _chosen(op, case, options.device) if "fusewright" in options.providers else ""
            )
            with no_fallback():
                for row in measure_op(op, name, case, options):
                    rows.append(about | row)
                    print(_line(rows[-1]), flush=True)
                    if options.csv:  # a run that is cut short keeps what it has
                        write_csv(options.csv, rows, environment)
            if options.csv and broken_context():  # no later call of this process runs
                rest = ["--resume", "--within", str(end - time.monotonic())]
                os.execv(sys.executable, [sys.executable, *sys.argv, *rest])
    ours = (row for row in rows if row["provider"] in PROVIDERS)
    return 1 if any(row["error"] and not row["note"] for row in ours) else 0


def _chosen(op: Op, case: Case, device: str) -> str:
    """Let the op choose among its candidates; each choice, with microseconds or reasons."""
    place = torch.empty(0, device=device).device
    before = set(map(str, choices(place)))
    with contextlib.suppress(Exception):  # the rows say what fails
        outputs = _flat(op.call(*case.args))
        if case.leaves():
            torch.autograd.grad(outputs, case.leaves(), [torch.randn_like(t) for t in outputs])
    new = [text for text in map(str, choices(place)) if text not in before]
    for text in new:
        print(f"  chosen: {text}", flush=True)
    return " | ".join(new)


def measure_op(
    op: Op, name: str, case: Case, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Measure one op on one case, all providers.

    Yields:
        One row per direction (``forward``, ``forward+backward``) and provider; forward alone where
        nothing wants a gradient, and one row per provider where each is called ``--once``.
    """
    torch._dynamo.reset()
    with torch.no_grad():
        expected = _flat(op.reference(*case.args))
    upstream = [torch.randn_like(t) for t in expected]
    slow, cost = "; ".join(op.unsupported(*case.args)), op.cost(*case.args)
    providers: dict[str, Callable[[], Callable[..., Any]]] = {}
    for provider in options.providers:
        if provider == RIVALS_TOO:
            for rival, prepare in RIVALS.get(name, {}).items():
                providers[rival] = functools.partial(prepare, *case.args)
        else:
            providers[provider] = functools.partial(PROVIDERS[provider], op)
    functions, facts = {}, {}
    for provider, make in providers.items():
        try:
            function = make()
            facts[provider] = _check(function, case, expected, upstream) | {"error": ""}
            functions[provider] = function
        except Exception as error:
            facts[provider] = {"error": _said(error)}
        facts[provider]["note"] = slow if provider.startswith("fusewright") else ""
    if options.once:
        yield from (
            {"direction": "once", "provider": name} | found for name, found in facts.items()
        )
        return
    for direction in ("forward", "forward+backward")[: 1 + bool(case.leaves())]:
        backward = upstream if direction != "forward" else None
        calls = {name: _bind(fn, case, backward) for name, fn in functions.items()}
        try:
            samples = sample(calls, options.device, options.seconds)
        except Exception as error:  # of one of them, and most often the end of this process' GPU
            facts = {provider: found | {"error": _said(error)} for provider, found in facts.items()}
            samples = {}
        for provider in providers:
            timing = summary(samples[provider]) if provider in samples else {}
            if timing and direction == "forward":
                timing |= rates(cost, timing["median_ms"])
            yield {"direction": direction, "provider": provider} | timing | facts[provider]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def rates(cost: Cost, milliseconds: float) -> dict[str, float]:
    """What forward reaches: of the op's products, and of the bytes that it must read and write."""
    return {
        "gflop_per_s": cost.flops / milliseconds / 1e6,
        "gb_per_s": (cost.bytes_read + cost.bytes_written) / milliseconds / 1e6,
    }


class Sample(NamedTuple):
    """One call: the device's milliseconds, and on a GPU those of the host, which runs ahead."""

    device_ms: float
    host_ms: float | None = None


def sample(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float
) -> dict[str, list[Sample]]:
    """Time the calls in turn until each has been sampled for ``seconds``."""
    once = _gpu_sampler() if device == "cuda" else _cpu_sample
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for call in calls.values():
        call()

    def wants(taken: list[Sample]) -> bool:
        few = device != "cuda" or len(taken) < MOST
        return len(taken) < 5 or (few and sum(s.device_ms for s in taken) < seconds * 1e3)

    while any(map(wants, samples.values())):
        for name, call in calls.items():
            if wants(samples[name]):
                samples[name].append(once(call))
    return samples


def _cpu_sample(call: Callable[[], Any]) -> Sample:
    start = time.perf_counter()
    call()
    return Sample((time.perf_counter() - start) * 1e3)


MOST = 50
"""Samples on a GPU, each of which has the GPU sleep first."""

SLEEP = 8_000_000
"""Cycles that the GPU sleeps before each call: about 4 ms, in which the host makes its launches."""


def _gpu_sampler() -> Callable[[Callable[[], Any]], Sample]:
    """A sampler that empties the L2 cache, and lets the host run ahead of the GPU."""
    flush = torch.empty(256 * MB, dtype=torch.int8, device="cuda")

    def once(call: Callable[[], Any]) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(SLEEP)
        start.record()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        return Sample(float(start.elapsed_time(end)), host * 1e3)

    return once


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile and count of the samples; the host's median."""
    tenths = statistics.quantiles((s.device_ms for s in samples), n=10)
    host = [s.host_ms for s in samples if s.host_ms is not None]
    return {
        "median_ms": statistics.median(s.device_ms for s in samples),
        "p10_ms": tenths[0],
        "p90_ms": tenths[-1],
        "host_median_ms": statistics.median(host) if host else "",
        "samples": len(samples),
    }


def _check(
    function: Callable[..., Any], case: Case, expected: list[Tensor], upstream: list[Tensor]
) -> dict[str, Any]:
    """One forward and backward: the distance to the reference, and what it holds in memory."""
    saved: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in case.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    _bind(function, case, upstream)()  # compiles, tunes
    gpu = expected[0].is_cuda
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = _flat(function(*case.args))
    gradients = torch.autograd.grad(outputs, case.leaves(), upstream) if case.leaves() else ()
    peak = (torch.cuda.max_memory_allocated() - before) / MB if gpu else ""
    del gradients
    differences = [errors(a, b).rms for a, b in zip(outputs, expected, strict=True)]
    return {
        "saved_mb": sum(saved.values()) / MB,
        "gpu_peak_mb": peak,
        "difference": max(differences),
    }


def _bind(
    function: Callable[..., Any], case: Case, upstream: list[Tensor] | None
) -> Callable[[], Any]:
    """A call without arguments: forward, or forward and backward with these upstream gradients."""
    leaves = case.leaves()

    def forward() -> list[Tensor]:
        return _flat(function(*case.args))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, upstream)

    return both if leaves and upstream is not None else forward


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _line(row: dict[str, Any]) -> str:
    start = f"{row['op']:<22}{row['shape']:<18}{row['direction']:<18}{row['provider']:<21}"
    if row["error"] or "median_ms" not in row:
        return start + (row["error"] or f"off by {row['difference']:.2g}")
    reached = ""
    if "gb_per_s" in row:
        reached = f"{row['gflop_per_s']:>9.1f} GFLOP/s{row['gb_per_s']:>8.1f} GB/s  "
    saved = f"{row['median_ms']:>10.3f} ms{row['saved_mb']:>10.1f} MB saved  "
    host = f"host {row['host_median_ms']:.3f} ms  " if row["host_median_ms"] != "" else ""
    return start + saved + host + reached + row["note"]


def write_csv(path: Path, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write the rows, each with what it was measured on."""
    full = [row | environment for row in rows]
    fields = list(dict.fromkeys(field for row in full for field in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(full)
    write_whole(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier part of this run."""
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _parse(arguments: Sequence[str] | None, known: list[str]) -> argparse.Namespace:
    def subset(of: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            unknown = [name for name in names if name not in of]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(of)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ops", type=subset(known), default=known)
    providers = [*PROVIDERS, RIVALS_TOO]
    parser.add_argument("--providers", type=subset(providers), default=list(PROVIDERS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--smallest", action="store_true", help="one shape that takes no time")
    parser.add_argument("--seconds", type=float, default=0.2, help="sampling per median")
    parser.add_argument("--once", action="store_true", help="call each once, and time nothing")
    parser.add_argument("--within", type=float, default=math.inf, help="begin no op after seconds")
    parser.add_argument("--resume", action="store_true", help="leave what --csv has as it is")
    parser.add_argument("--train-weights", action="store_true", help="weights want gradients too")
    parser.add_argument("--csv", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
