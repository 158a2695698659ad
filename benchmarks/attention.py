"""Attention that models write out, a layer's: the op against transformers' eager function.

    python benchmarks/attention.py --layers gpt_oss,gpt_oss-window,gemma2 --tokens 1024,2048

The functions get what a model passes them: heads as projections leave them, and a dense additive
mask. Each provider runs in a process of its own; the time is the least of the steps (forward and
backward), the memory what the process grew by at its peak.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.attention.attention import attention

LAYERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"heads": 64, "groups": 8, "dim": 64},
    "gpt_oss-window": {"heads": 64, "groups": 8, "dim": 64, "window": 128},
    "gemma2": {"heads": 8, "groups": 4, "dim": 256, "softcap": 50.0},
}
"""gpt-oss-20b's full and sliding layers, and Gemma-2-2b's."""


def step_of(layer: str, tokens: int, dtype: torch.dtype, ours: bool) -> Callable[[], Any]:
    """A forward and backward pass."""
    sizes = LAYERS[layer]
    heads, groups, dim, softcap = (sizes.get(k) for k in ("heads", "groups", "dim", "softcap"))

    def draw(count: int) -> Tensor:
        return torch.randn(1, tokens, count, dim, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v, sinks = draw(heads), draw(groups), draw(groups), torch.randn(heads, dtype=dtype)
    order = torch.arange(tokens)
    distance = order[:, None] - order
    hidden = (distance < 0) | (distance >= sizes.get("window", tokens))
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype)
    mask = mask.masked_fill_(hidden, torch.finfo(dtype).min)
    upstream = torch.randn(1, tokens, heads, dim, dtype=dtype)
    name, has_sinks = layer.split("-")[0], softcap is None
    model = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    module = SimpleNamespace(
        num_key_value_groups=heads // groups, sinks=sinks.requires_grad_(has_sinks), training=True
    )
    extra = {} if has_sinks else {"softcap": softcap}

    def step() -> Any:
        if ours:
            column = sinks if has_sinks else None
            out = attention(q, k, v, dim**-0.5, False, mask, None, column, softcap).transpose(1, 2)
        else:
            eager = model.eager_attention_forward
            out = eager(module, q, k, v, mask, scaling=dim**-0.5, **extra)[0]
        needed = [q, k, v, *([sinks] if has_sinks else [])]
        return torch.autograd.grad(out, needed, upstream)

    return step


def measure(arguments: tuple[str, int, str, bool, int]) -> tuple[float, float]:
    """Milliseconds a step, and the process's growth in MB."""
    layer, tokens, dtype, ours, steps = arguments
    small = step_of(layer, 32, getattr(torch, dtype), ours)
    small()  # compilers, libraries
    step = step_of(layer, tokens, getattr(torch, dtype), ours)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return 1e3 * min(times), grown / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--tokens", default="1024,2048")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| layer | tokens | eager ms | op ms | times | eager MB | op MB |")
    for layer in options.layers.split(","):
        for tokens in map(int, options.tokens.split(",")):
            rows = []
            for ours in (False, True):
                with context.Pool(1) as pool:
                    given = layer, tokens, options.dtype, ours, options.steps
                    rows.append(pool.apply(measure, (given,)))
            (slow, much), (fast, little) = rows
            figures = f"{slow:.0f} | {fast:.0f} | {slow / fast:.1f} | {much:.0f} | {little:.0f}"
            print(f"| {layer} | {tokens} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
