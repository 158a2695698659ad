"""One engine in its own process: loads its model once, then measures one workload per line.

Started by ``step_matrix.py``. The job is JSON on the command line, each workload is JSON on a line
of its own, and one JSON line comes back for each. A workload that fails, for want of memory for
one, ends itself only.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

from worker import Memory, main, send


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
        training.optimizer.zero_grad()
        send(replies, reply | {"fallbacks": _fallbacks()})


def _measured(model: Any, optimizer: Any, job: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """First step, warm-up, timed steps; peaks of the first step and of the others apart.

    The first step of ours captures and verifies: what it needs beside, later steps do not.
    """
    import torch

    from shapes import MODELS
    from workload import packed, step

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
    reply: dict[str, Any] = {
        "losses": [loss for loss, _ in (*first, *warm, *steps)],
        "first_step_s": first[0][1],
        "all_step_s": [seconds for _, seconds in steps],
        "loaded": steady_memory.loaded,
        "first_peak": first_peak,
        "steady_peak": steady_memory.peak(),
    }
    if wanted["profile"]:
        from idle_gaps import profile

        trace = Path(wanted["trace"]) if wanted["trace"] else None
        reply["profile"] = profile(timed, job.device, trace)
    gc.collect()
    return reply


def _fallbacks() -> dict[str, str]:
    """The ops whose kernel has failed in this process."""
    fallback = sys.modules.get("fusewright.kernels.fallback")
    return dict(fallback.FAILED) if fallback else {}


if __name__ == "__main__":
    sys.exit(main(_serve))
