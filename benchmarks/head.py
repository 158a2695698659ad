"""The output head and its log-probabilities: ours, eager's, TRL's, and the matmuls alone.

    python benchmarks/head.py --dtype bfloat16 --head frozen --threads 1 --json FILE

Each contender has its own process and runs forward and backward once per round, in turn with the
others. The default sizes are those of SmolLM2-135M's head.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

TILE_ROWS = 512
TOLERANCE = 0.02
"""How far the log-probabilities' sum and the gradients' norms may be from eager's."""


@dataclass(frozen=True)
class HeadJob:
    """What one contender shall do; ``engine`` is its name."""

    engine: str
    dtype: str
    trained: bool
    rows: int
    hidden: int
    vocabulary: int
    threads: int


@dataclass(frozen=True)
class Operands:
    """The head's operands: x (8, rows / 8, hidden) and targets, the upstream gradient of a row."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


def products(o: Operands) -> None:
    """The matmuls that forward and backward need at least, in tiles."""
    x = o.x.detach().flatten(0, 1)
    logits = x.new_empty(min(TILE_ROWS, x.shape[0]), o.weight.shape[0])
    weight = o.weight.detach()
    for part in x.split(TILE_ROWS):
        tile = torch.mm(part, weight.t(), out=logits[: len(part)])
        torch.mm(tile, weight)
        if o.weight.requires_grad:
            torch.mm(tile.t(), part)


def eager_loss(o: Operands) -> Tensor:
    """The cross entropy of fp32 logits, as transformers computes it."""
    logits = linear(o.x, o.weight).float().flatten(0, 1)
    return -cross_entropy(logits, o.targets.flatten(), reduction="none").view_as(o.targets)


def eager_logprobs(o: Operands) -> Tensor:
    """TRL's log-probabilities of logits that exist."""
    from trl.trainer.utils import selective_log_softmax

    found: Tensor = selective_log_softmax(linear(o.x, o.weight), o.targets)
    return found


def trl_head(o: Operands) -> Tensor:
    """TRL's fused head, as it calls it."""
    from trl.trainer import utils

    found = utils._ChunkedLogProbFunction.apply(
        o.x.flatten(0, 1), o.weight, None, o.targets.flatten(), 1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",),
    )  # fmt: skip
    return found[0].view_as(o.targets)


def our_head(o: Operands) -> Tensor:
    """``linear_logprob``."""
    from fusewright.kernels.loss.linear_logprob import linear_logprob

    return linear_logprob(o.x, o.weight, None, o.targets)[0]


CONTENDERS: dict[str, Callable[[Operands], Tensor | None]] = {
    "products": products,
    "eager cross entropy": eager_loss,
    "eager log-probs": eager_logprobs,
    "trl fused head": trl_head,
    "fusewright": our_head,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 when all contenders agree."""
    options = _parse(arguments)
    from environment import describe
    from harness import EngineProcess

    trained = options.head == "trained"
    sizes = options.rows, options.hidden, options.vocabulary, options.threads
    jobs = [HeadJob(name, options.dtype, trained, *sizes) for name in options.contenders]
    found: dict[str, list[dict[str, Any]]] = {job.engine: [] for job in jobs}
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(EngineProcess(job, Path(__file__))) for job in jobs]
        for process in running:
            process.load()
        for number in range(options.rounds):
            turn = number % len(running)
            for process in running[turn:] + running[:turn]:
                found[process.run.job.engine].append(process.ask("run"))
    rows = [asdict(job) | summary(found[job.engine]) for job in jobs]
    base = next((row["seconds"] for row in rows if row["engine"] == "products"), None)
    for row in rows:
        ratio = f"{row['seconds'] / base:6.2f}x the products" if base else ""
        print(f"{row['engine']:<22}{row['seconds']:8.3f} s{row['growth_mb']:9.0f} MB  {ratio}")
    if options.json:
        options.json.write_text(json.dumps([row | describe() for row in rows], indent=2) + "\n")
    checked = [row["check"] for row in rows if row["check"]]
    agree = all(
        abs(a - b) <= TOLERANCE * abs(b)
        for check in checked
        for a, b in zip(check, checked[0], strict=True)
    )
    if not agree:
        print("the contenders disagree", file=sys.stderr)
    return 0 if agree else 1


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a contender's rounds, and all its seconds."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "growth_mb": statistics.median(run["growth_mb"] for run in runs),
        "check": runs[-1]["check"],
        "all_seconds": [run["seconds"] for run in runs],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--head", choices=("frozen", "trained"), default="frozen")
    parser.add_argument("--rows", type=int, default=1024, help="a multiple of 8")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.contenders = options.contenders.split(",")
    unknown = set(options.contenders) - set(CONTENDERS)
    if unknown:
        parser.error(f"unknown contender {sorted(unknown)[0]!r}; known: {', '.join(CONTENDERS)}")
    return options


def operands(job: HeadJob) -> Operands:
    """Random operands; the weight wants a gradient if the head is trained."""
    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    shape = (8, job.rows // 8)
    x = torch.randn(*shape, job.hidden).to(dtype)
    weight = (torch.randn(job.vocabulary, job.hidden) * job.hidden**-0.5).to(dtype)
    targets = torch.randint(job.vocabulary, shape)
    return Operands(x, weight.requires_grad_(job.trained), targets, torch.randn(shape))


def serve(job: HeadJob) -> None:
    """The process of one contender: one forward and backward for each line that it is sent."""
    from worker import Memory, send

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies
    if job.threads:
        torch.set_num_threads(job.threads)
    given, call = operands(job), CONTENDERS[job.engine]
    few = Operands(given.x[:, :2], given.weight, given.targets[:, :2], given.upstream[:, :2])
    _run(few, call)
    memory = Memory("cpu")
    send(replies, {"loaded": memory.loaded, "setting": {}})
    while sys.stdin.readline():
        memory = Memory("cpu")
        start = time.perf_counter()
        check = _run(given, call)
        seconds = time.perf_counter() - start
        growth = memory.peak()["rss_mb"] - memory.loaded["rss_mb"]
        send(replies, {"seconds": seconds, "growth_mb": growth, "check": check})


def _run(o: Operands, call: Callable[[Operands], Tensor | None]) -> list[float]:
    """Forward and backward; the log-probabilities' mean and the norms of the gradients."""
    x = o.x.detach().requires_grad_()
    weight = o.weight.detach().requires_grad_(o.weight.requires_grad)
    out = call(Operands(x, weight, o.targets, o.upstream))
    if out is None:
        return []
    out.backward(o.upstream.to(out.dtype))
    norms = [float(t.grad.float().norm()) for t in (x, weight) if t.grad is not None]
    return [float(out.detach().float().mean()), *norms]


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve(HeadJob(**json.loads(sys.argv[1])))
    else:
        raise SystemExit(main())
