"""Whole training steps of small state-space models, eager and fusewright, side by side.

    python benchmarks/scan.py --model mamba --seq 1024 --steps 3 --json FILE
    python benchmarks/scan.py --delta qwen3_next --seq 1024 --threads 1 --dtype bfloat16

With ``--delta`` it is the delta rule alone, forward and backward, at the published width of one
layer: our op, and the function that transformers calls where ``fla-core`` is not installed.

Eager loops over time, seconds per step at such lengths, too slow for ``train_step.py``: here the
two engines' steps alternate in one process, from equal weights and on equal data, and the medians
of the steps after the first are compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8},
    "130m-2layers": {"hidden_size": 768, "num_hidden_layers": 2, "vocab_size": 512},
}
"""Published or tiny shapes, cut to two blocks; what is not named is the architecture's default."""

MODELS = ("mamba", "falcon_mamba", "mamba2")

DELTA = {
    "qwen3_next": ("torch_chunk_gated_delta_rule", "gated_delta_rule", 16, 32, 128),
    "kimi_linear": ("chunk_kimi_delta_attention", "kda", 32, 32, 128),
}
"""transformers' function, our op, heads of keys and of values, and their features."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when the losses of both engines agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="mamba")
    parser.add_argument("--delta", choices=tuple(DELTA))
    parser.add_argument("--heads", type=int, help="of keys, with --delta, in place of all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--codegen", default="eager")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = compare_delta(options) if options.delta else compare(options)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["loss_difference"] < (1e-2 if options.delta else 1e-3) else 1


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the steps of both engines; times in seconds, the first step apart."""
    from fusewright import optimize

    eager = build(options.model, options.size)
    ours = optimize(copy.deepcopy(eager), codegen=options.codegen)
    models = {"eager": eager, "fusewright": ours}
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-5) for n, m in models.items()}
    seconds: dict[str, list[float]] = {n: [] for n in models}
    losses: dict[str, list[float]] = {n: [] for n in models}
    for _ in range(options.steps + 1):
        ids = torch.randint(512, (options.batch, options.seq))
        for name, model in models.items():
            begun = time.perf_counter()
            losses[name].append(step(model, optimizers[name], ids))
            seconds[name].append(time.perf_counter() - begun)
    median = {n: statistics.median(s[1:]) for n, s in seconds.items()}
    pairs = zip(losses["eager"], losses["fusewright"], strict=True)
    return vars(options) | {
        "json": None,
        "threads": torch.get_num_threads(),
        "step_s": median,
        "first_step_s": {n: s[0] for n, s in seconds.items()},
        "ratio": median["eager"] / median["fusewright"],
        "loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
    }


def compare_delta(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate calls and their backward passes; the least times in seconds, memory in bytes.

    ``kept`` is what autograd keeps for backward.
    """
    from fusewright.rewrite.op_table import TABLE

    function, op, groups, heads, features = DELTA[options.delta]
    groups, heads = (options.heads or groups), heads * (options.heads or groups) // groups
    modeling = f"transformers.models.{options.delta}.modeling_{options.delta}"
    call = getattr(importlib.import_module(modeling), function)
    torch.manual_seed(0)
    sizes = (options.batch, options.seq)
    q, k, v = (torch.randn(*sizes, n, features) for n in (groups, groups, heads))
    g = -torch.rand(*sizes, heads, *([features] if op == "kda" else []))
    beta = torch.rand(*sizes, heads)
    tensors = [t.to(getattr(torch, options.dtype)) for t in (q, k, v, beta)]
    q, k, v, beta, g = inputs = [t.requires_grad_() for t in (*tensors, g)]
    calls = {
        "eager": lambda: call(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0],
        "fusewright": lambda: TABLE[op](q, k, v, g, beta, None, True)[0],
    }
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    kept, results = dict.fromkeys(calls, 0), {}
    for _ in range(options.steps + 1):
        for name, run in calls.items():
            pieces: dict[int, int] = {}

            def keep(t: Tensor, pieces: dict[int, int] = pieces) -> Tensor:
                pieces[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            begun = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = run()
            grads = torch.autograd.grad(out.sum(), inputs)
            seconds[name].append(time.perf_counter() - begun)
            kept[name], results[name] = sum(pieces.values()), (out.detach(), *grads)
    pairs = zip(*results.values(), strict=True)
    best = {n: min(s) for n, s in seconds.items()}
    return vars(options) | {
        "json": None,
        "threads": torch.get_num_threads(),
        "seconds": best,
        "ratio": best["eager"] / best["fusewright"],
        "kept": kept,
        "loss_difference": max(float((a - b).norm() / a.norm()) for a, b in pairs),
    }


def build(name: str, size: str) -> nn.Module:
    """A model with random weights, to train."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = dict(SIZES[size])
    if name == "mamba2":
        width = 2 * sizes["hidden_size"]
        head = 16 if size == "tiny" else 64
        sizes |= {"num_heads": width // head, "head_dim": head, "n_groups": 1}
    config = AutoConfig.for_model(name, **sizes)
    return AutoModelForCausalLM.from_config(config).train()


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward and optimizer on ``ids`` (batch, seq); the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    raise SystemExit(main())
