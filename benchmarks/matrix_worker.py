"""One engine in its own process: loads its model once, then measures one workload per line.

Started by ``step_matrix.py``. The job is JSON on the command line, each workload is JSON on a line
of its own, and one JSON line comes back for each. A workload that fails, for want of memory for
one, ends itself only; one that breaks the GPU's context ends the process, with a reply.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sticky import broken_context
from worker import MB, Memory, main, send


def _serve(fields: dict[str, Any], replies: IO[str]) -> None:
    import torch

    from engines import prepare
    from workload import Job, build

    job = Job(**fields)
    training = build(job)
    memory = Memory(job.device)
    model = prepare(training.model, job)
    setting = {"peak_rss_from": memory.source, "threads": torch.get_num_threads()}
    send(replies, {"loaded": memory.loaded, "setting": setting})
    for line in sys.stdin:
        try:
            reply = _measured(model, training.optimizer, job, json.loads(line))
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr)
            reply = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            if broken_context():
                send(replies, reply | {"fallbacks": _fallbacks(), "ended": True})
                os._exit(1)
        training.optimizer.zero_grad()
        send(replies, reply | {"fallbacks": _fallbacks()})


def _measured(model: Any, optimizer: Any, job: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """First step, warm-up, timed steps, steps that run freely; peaks of the first one apart.

    The first step of ours captures and verifies: what it needs beside, later steps do not.
    """
    import torch

    from shapes import MODELS
    from workload import launch_step, packed, step

    torch.manual_seed(wanted["seed"])
    shape = wanted["batch"], wanted["seq"]
    ids = torch.randint(MODELS[job.model].vocab, shape, device=job.device)
    batch = packed(ids, wanted["sample"]) if wanted["sample"] else ids

    def timed() -> tuple[float, float]:
        start = time.perf_counter()
        loss = step(model, optimizer, batch, wanted["autocast"])
        return loss, time.perf_counter() - start

    first_memory = Memory(job.device)
    first = [timed()]
    first_peak = first_memory.peak()
    del first_memory
    steady_memory = Memory(job.device)
    warm = [timed() for _ in range(wanted["warmup"])]
    steps = [timed() for _ in range(wanted["steps"])]
    steady_peak = steady_memory.peak()
    free = _running_freely(
        lambda: launch_step(model, optimizer, batch, wanted["autocast"]),
        job.device,
        wanted["steps"],
    )
    reply: dict[str, Any] = {
        "losses": [loss for loss, _ in (*first, *warm, *steps)],
        "first_step_s": first[0][1],
        "all_step_s": [seconds for _, seconds in steps],
        "loaded": steady_memory.loaded,
        "first_peak": first_peak,
        "steady_peak": steady_peak,
        "free_step_s": free,
        "planned": _planned(model),
    }
    if wanted["profile"]:
        from idle_gaps import profile

        trace = Path(wanted["trace"]) if wanted["trace"] else None
        reply["profile"] = profile(timed, job.device, trace)
    gc.collect()
    return reply


def _running_freely(launch: Callable[[], Any], device: str, count: int) -> float:
    """Seconds of a step among ``count`` of which none waits for the GPU, as trainers run them."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            launch()
        return (time.perf_counter() - start) / count
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    torch.cuda.synchronize()
    # the first one also waits for the host, which the others let run ahead
    return statistics.median(itertools.starmap(_seconds, itertools.pairwise(marks)))


def _seconds(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) / 1e3


def _planned(model: Any) -> dict[str, float] | None:
    """The peak of the first step in MB: what our planner predicted, and what it measured."""
    if "fusewright" not in sys.modules:
        return None
    from fusewright.compiler.pipeline import planner_of

    planner = planner_of(model)
    if planner is None or planner.predicted is None or planner.measured is None:
        return None
    return {"predicted_mb": planner.predicted / MB, "measured_mb": planner.measured / MB}


def _fallbacks() -> dict[str, str]:
    """The ops whose kernel has failed in this process."""
    fallback = sys.modules.get("fusewright.kernels.fallback")
    return dict(fallback.FAILED) if fallback else {}


if __name__ == "__main__":
    sys.exit(main(_serve))
