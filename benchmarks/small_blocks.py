"""Time a decoder block, optimized and original, by size, to calibrate the rule for small blocks.

    python -m benchmarks.small_blocks --json FILE

Each row is forward and backward of a Llama block, with LoRA adapters of rank 8 on all linears (or
with ``--method full``, all weights trained), in eager code and optimized, interleaved in this
process on one processor. Times are processor time, the least of many rounds. The last columns are
the decision of ``compiler/small_blocks.py`` and its violation of the rule's contract: no block that
runs optimized is more than 3% slower than eager code, and none that would be more than 10% faster
keeps its original code. The exit status is 1 if there is a violation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["FUSEWRIGHT_SMALL"] = "optimize"  # both forms are timed, whatever the rule decides

import torch
from torch import Tensor, nn

SLOWER, FASTER = 1.03, 0.90
"""Time relative to eager code: more is a violation where optimized, less where original."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 if the rule keeps its contract in every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", default="64,128,256,512,1024,2048")
    parser.add_argument("--tokens", default="32,64,128,256,512,1024,2048,4096")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--largest", type=float, default=60.0, help="seconds of a row's one call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[-options.threads :])
    torch.set_num_threads(options.threads)
    rows = []
    print("| hidden | tokens | dtype | codegen | eager us | ours / eager | rule | violation |")
    print("|---|---|---|---|---|---|---|---|")
    for hidden in map(int, options.hidden.split(",")):
        for dtype in options.dtypes.split(","):
            for row in measure(hidden, getattr(torch, dtype), options):
                rows.append(row)
                print(line(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [row for row in rows if row["violation"]]
    print(f"{len(rows)} rows, {len(wrong)} violations")
    return 1 if wrong else 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['hidden']} | {row['tokens']} | {row['dtype']} | {row['codegen']} "
        f"| {row['eager_us']:,.0f} | {row['ratio']:.3f} | {row['rule']} | {row['violation']} |"
    )


def measure(
    hidden: int, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one width and dtype."""
    from fusewright.compiler.pipeline import _session_of
    from fusewright.compiler.small_blocks import why_small

    plain, rotary = blocks(hidden, dtype, options.method)
    optimized, _ = blocks(hidden, dtype, options.method, optimizing=True)
    session = _session_of(optimized.owner)
    for tokens in map(int, options.tokens.split(",")):
        shape = (max(1, tokens // 512), min(tokens, 512), hidden)
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        position = rotary(x, torch.arange(shape[1])[None])
        grad = torch.randn_like(x)
        steps = [stepping(block, x, position, grad) for block in (plain, optimized)]
        for step in steps:  # captures and compiles
            step()
        eager, ours = fastest(steps, options.seconds)
        ratio = ours / eager
        reason = why_small(x, tokens)
        violation = ""
        if not reason and ratio > SLOWER:
            violation = f"{ratio - 1:.1%} slower"
        if reason and ratio < FASTER:
            violation = f"{1 - ratio:.1%} faster, and left out"
        yield {
            "hidden": hidden, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
            "method": options.method, "threads": options.threads,
            "codegen": session.choices.codegen[0], "eager_us": 1e6 * eager, "ours_us": 1e6 * ours,
            "ratio": ratio, "rule": "original" if reason else "optimized", "reason": reason or "",
            "violation": violation,
        }  # fmt: skip


def blocks(
    hidden: int, dtype: torch.dtype, method: str, optimizing: bool = False
) -> tuple[Any, nn.Module]:
    """The second block of a model, and the model's rotary embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fusewright import optimize

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=4 if hidden <= 512 else 2, num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128), use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(dtype)
    base = model.model
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, adapters)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
    model.train()
    if optimizing:
        optimize(model)
    block = base.layers[1]
    object.__setattr__(block, "owner", model)
    return block, base.rotary_emb


def stepping(
    block: nn.Module, x: Tensor, position: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], None]:
    """Forward and backward of one block."""
    wanted = [p for p in block.parameters() if p.requires_grad]

    def step() -> None:
        given = x.detach().requires_grad_()
        out = block(given * 1, attention_mask=None, position_embeddings=position)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, [given, *wanted], grad)

    return step


def fastest(steps: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """The least processor time of each step, in turns, in ``seconds`` or at least three rounds."""
    times: list[list[float]] = [[] for _ in steps]
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 1000):
        rounds += 1
        for step, taken in zip(steps, times, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


if __name__ == "__main__":
    sys.exit(main())
