"""A mixture of experts, eager and optimized: full training steps of one small model, in turn.

    python benchmarks/moe.py --model qwen3-moe --method lora --dtype bfloat16 --threads 2

Two layers with 64 experts of hidden size 256 and inner size 512; two experts per token
(``mixtral``) or eight (``qwen3-moe``). Eager is transformers' own default. A step is forward,
backward and AdamW; both sides step in turn on the same batches, and the medians are compared.
Time is what the clock shows, or with ``--cpu-time`` what the process used: that is fair on a busy
machine, with one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from environment import describe
from fusewright import explain, optimize

EXPERTS, HIDDEN, INNER, VOCAB = 64, 256, 512, 2048
ACTIVE = {"mixtral": 2, "qwen3-moe": 8}


def build(name: str, dtype: torch.dtype) -> Any:
    """The model with random weights."""
    import transformers

    shared = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts_per_tok": ACTIVE[name],
        "use_cache": False,
    }
    if name == "mixtral":
        config: Any = transformers.MixtralConfig(
            **shared, intermediate_size=INNER, num_local_experts=EXPERTS
        )
    else:
        config = transformers.Qwen3MoeConfig(
            **shared, moe_intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=True
        )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def adapted(model: Any) -> Any:
    """The model with frozen weights, and LoRA of rank 16 on the attention's projections."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))


class Side:
    """One model with its optimizer, and the times and losses of its steps."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, ids: Tensor) -> None:
        """One full training step."""
        start = self.clock()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(self.clock() - start)
        self.losses.append(float(loss.detach()))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Step both models in turn; return the figures."""
    model = build(args.model, getattr(torch, args.dtype))
    if args.method == "lora":
        model = adapted(model)
    clock = time.process_time if args.cpu_time else time.perf_counter
    sides = {
        "eager": Side(copy.deepcopy(model), clock),
        "fusewright": Side(optimize(model, codegen=args.codegen), clock),
    }
    batches = torch.randint(VOCAB, (args.warmup + args.steps, args.batch, args.seq))
    for number, ids in enumerate(batches):
        for side in list(sides.values())[:: 1 if number % 2 else -1]:
            side.step(ids)
    medians = {n: statistics.median(s.seconds[args.warmup :]) for n, s in sides.items()}
    best = {n: min(s.seconds[args.warmup :]) for n, s in sides.items()}
    return {
        **{k: v for k, v in vars(args).items() if k != "json"},
        "median_ms": {n: round(1e3 * t, 1) for n, t in medians.items()},
        "minimum_ms": {n: round(1e3 * t, 1) for n, t in best.items()},
        "ratio_of_medians": round(medians["eager"] / medians["fusewright"], 3),
        "ratio_of_minima": round(best["eager"] / best["fusewright"], 3),
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(*(s.losses for s in sides.values()), strict=True)
        ),
        "rewrites": explain(sides["fusewright"].model).by_rule(),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=tuple(ACTIVE), default="mixtral")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--codegen", choices=("eager", "inductor", "auto"), default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures = measure(args)
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**figures, **describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
