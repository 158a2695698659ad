"""One engine in its own process: loads, then takes one training step per line it is sent.

Started by ``harness.py``, which speaks the protocol: the job as JSON on the command line, one
``step`` line per step and one ``activations`` line at the end, one JSON line back for each. A
``step N`` takes the first N tokens of each sequence only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MB = 1 << 20


def main(serve: Callable[[dict[str, Any], IO[str]], None]) -> int:
    """Serve the job of the command line until the pipe closes.

    Args:
        serve: is given the job's fields and where replies go.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies
    try:
        serve(json.loads(sys.argv[1]), replies)
    except Exception as error:
        kind = type(error).__name__
        details = "" if kind == "EngineUnavailableError" else traceback.format_exc()
        send(replies, {"error": f"{kind}: {error}", "traceback": details})
        return 1
    return 0


def _serve(fields: dict[str, Any], replies: IO[str]) -> None:
    import torch

    from engines import prepare
    from workload import Job, activation_bytes, build, step

    job = Job(**fields)
    if job.threads:
        torch.set_num_threads(job.threads)
    training = build(job)
    memory = Memory(job.device)
    setting = {"peak_rss_from": memory.source, "threads": torch.get_num_threads()}
    send(replies, {"loaded": memory.loaded, "setting": setting})
    model = None
    for ids in training.batches:
        command, _, tokens = sys.stdin.readline().strip().partition(" ")
        if command != "step":
            return
        if tokens:
            ids = ids[:, : int(tokens)]
        start = time.perf_counter()
        if model is None:
            model = prepare(training.model, job)
        loss = step(model, training.optimizer, ids, job.autocast)
        seconds = time.perf_counter() - start
        send(replies, {"loss": loss, "seconds": seconds, "peak": memory.peak()})
    if sys.stdin.readline() == "activations\n":
        kept = activation_bytes(model, training.batches[-1], job.autocast)
        send(replies, {"activation_mb": kept / MB, "plan": _plan(model, job)})


def _plan(model: Any, job: Any) -> str | None:
    """What our planner chose, predicted and measured."""
    from engines import is_ours

    if not is_ours(job.engine):
        return None
    from fusewright import explain

    return explain(model).memory


class Memory:
    """The memory in use once the model is loaded, and the peak since then, in MB.

    Loading has peaks of its own (dequantizing a GGUF file holds several copies), so the kernel's
    high-water mark is set back first. Where that is not permitted, the mark is the whole process's
    ``ru_maxrss``, and ``source`` says so.
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        self.gpu = device == "cuda"
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.source = "VmHWM, reset after loading"
        except OSError:
            self.source = "ru_maxrss, loading included"
        self.loaded = {"rss_mb": _status_kb("VmRSS") / 1024}
        if self.gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.loaded["gpu_mb"] = torch.cuda.memory_allocated() / MB

    def peak(self) -> dict[str, float]:
        """The peak since loading: resident memory, and allocated GPU memory on a GPU."""
        if self.source.startswith("VmHWM"):
            found = {"rss_mb": _status_kb("VmHWM") / 1024}
        else:
            found = {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if self.gpu:
            import torch

            found["gpu_mb"] = torch.cuda.max_memory_allocated() / MB
        return found


def _status_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) if match else 0


def send(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(_serve))
