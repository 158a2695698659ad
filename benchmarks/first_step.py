"""Seconds of the first step of one process and of several: capture, verification, compilation.

    python benchmarks/first_step.py --ranks 1,4 --codegen eager
    python benchmarks/first_step.py --ranks 1,4 --codegen inductor --model smollm2
    python benchmarks/first_step.py --ranks 1 --codegen inductor --model smollm2 --again

Every count of ranks starts with an empty cache. With ``--again``, it starts once more with the
cache that it has filled.

The ranks have one thread each and wait for each other before and after the step. The seconds of the
processor are those of all ranks, and of the compilers that they have started, and say most where
the machine is shared; the parts, by the clock, are those of the rank that took longest:

- verification, with what it waited for other ranks' verdicts;
- Inductor, with the C++ compiler and what it waited for other ranks' compilations;
- the rest: TorchDynamo's capture, which each process does for itself, the passes, and the step.

``smollm2`` has the sizes of SmolLM2 135M, with random weights; ``tiny`` has four small layers. Both
train LoRA on all linears.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import describe

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip


def main() -> None:
    """Measure each count of ranks, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--codegen", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--ranks", default="1,4", help="how many processes, by commas")
    parser.add_argument("--again", action="store_true", help="with a filled cache, too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rank-of", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        _rank(given)
        return
    print(
        "| ranks | cache | first step, s | CPU s, all ranks | of compilers | verification "
        "| sites verified | Inductor |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for count in map(int, given.ranks.split(",")):
        with tempfile.TemporaryDirectory() as cache:
            names = ("empty", "filled") if given.again else ("empty",)
            rows += [_row(count, name, _start(given, count, cache)) for name in names]
    if given.json:
        about = describe() | {"model": given.model, "codegen": given.codegen}
        given.json.write_text(json.dumps([about | row for row in rows], indent=2) + "\n")


def _row(count: int, cache: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all ranks; prints them as a row of the table."""
    last = max(found, key=lambda r: r["seconds"])
    cpu, compilers = (sum(r[name] for r in found) for name in ("cpu", "compilers"))
    verified = "+".join(str(r["verified"]) for r in found)
    print(
        f"| {count} | {cache} | {last['seconds']:.2f} | {cpu:.2f} | {compilers:.2f} "
        f"| {last['verification']:.2f} | {verified} | {last['inductor']:.2f} |",
        flush=True,
    )
    return {
        "ranks": count, "cache": cache, "first_step_s": last["seconds"], "cpu_s": cpu,
        "compilers_cpu_s": compilers, "verification_s": last["verification"],
        "sites_verified": verified, "inductor_s": last["inductor"],
    }  # fmt: skip


def _start(given: argparse.Namespace, count: int, cache: str) -> list[dict[str, Any]]:
    """Run ``count`` ranks; what each of them has printed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [sys.executable, str(Path(__file__).resolve()), "--model", given.model]
    words += ["--codegen", given.codegen, "--rank-of", str(count)]
    environ = {
        **os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            words, env={**environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    return [json.loads(text.splitlines()[-1]) for text in said]


def _rank(given: argparse.Namespace) -> None:
    """One process: print what its first step took, as JSON."""
    size, codegen, count = given.model, given.codegen, given.rank_of
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fusewright import optimize
    from fusewright.compiler.codegen import inductor
    from fusewright.rewrite import verify

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES[size]))
    if size == "smollm2":
        model = model.to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    spent: dict[str, float] = {}
    verified = _timed(verify, "_judge", {})
    _timed(verify.Verifier, "__call__", spent, "verification")
    _timed(inductor, "inductor", spent, "inductor")
    before = _children()
    optimize(model, codegen=codegen)
    call = torch.nn.parallel.DistributedDataParallel(model) if count > 1 else model
    ids = (torch.arange(128).reshape(2, 64) + dist.get_rank()) % 1000
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    call(input_ids=ids, labels=ids).loss.backward()
    dist.barrier()
    found = {
        "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu,
        "compilers": _children() - before,
        "verified": len(verified), "verification": 0.0, "inductor": 0.0, **spent,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def _children() -> float:
    """Processor seconds of the processes that this one has started, and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _timed(owner: Any, name: str, spent: dict[str, float], part: str = "") -> list[None]:
    """Add up the seconds of ``owner.name``; returns a list that grows by one with each call."""
    function: Callable[..., Any] = getattr(owner, name)
    calls: list[None] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

    setattr(owner, name, timed)
    return calls


if __name__ == "__main__":
    main()
