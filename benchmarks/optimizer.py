"""The optimizer's step alone on a model's adapters: tensor by tensor, and as one flat buffer.

    python benchmarks/optimizer.py --model smollm2-shape --rank 16

The ways step in turn on equal gradients; each row is a median, with the spread of the middle half.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fusewright import flatten_optimizer
from shapes import MODELS

WAYS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "flat foreach": lambda p: flatten_optimizer(torch.optim.AdamW(p, foreach=True)),
    "flat fused": lambda p: flatten_optimizer(torch.optim.AdamW(p, fused=True)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-shape", choices=list(MODELS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    shapes = adapter_shapes(options.model, options.rank)
    sets = {
        name: [torch.nn.Parameter(torch.randn(s, device=options.device)) for s in shapes]
        for name in WAYS
    }
    optimizers = {name: make(sets[name]) for name, make in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.steps + 2):
        for name, optimizer in optimizers.items():
            for p in sets[name]:
                p.grad = torch.randn_like(p)
            seconds[name].append(timed(optimizer.step, options.device))
    total = sum(p.numel() for p in sets["fused"])
    print(f"{len(shapes)} tensors, {total / 1e6:.2f}M elements, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, all_steps in seconds.items():
        low, middle, high = statistics.quantiles([1e3 * s for s in all_steps[2:]], n=4)
        print(f"{name:<14}{middle:>9.2f} ms  ({low:.2f} to {high:.2f})")
    return 0


def adapter_shapes(model: str, rank: int) -> list[tuple[int, int]]:
    """The LoRA tensors of all linears of ``model``, in order."""
    m = MODELS[model]
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    linears = [(m.hidden, q), (m.hidden, kv), (m.hidden, kv), (q, m.hidden)]
    linears += [(m.hidden, m.ffn), (m.hidden, m.ffn), (m.ffn, m.hidden)]
    return [s for _ in range(m.layers) for i, o in linears for s in ((rank, i), (o, rank))]


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds of one step, all of its work finished."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
