"""A mixture of experts, eager and optimized: full training steps of one small model, in turn.

    python benchmarks/moe.py --model qwen3-moe --method lora --dtype bfloat16 --threads 2
    python benchmarks/moe.py --model qwen3-30b-a3b --method experts --dtype bfloat16 --batch 1 \
        --seq 2048 --threads 2

Two layers with 64 experts of hidden size 256 and inner size 512; two experts per token
(``mixtral``) or eight (``qwen3-moe``); or one layer at the width of ``qwen3-30b-a3b`` or
``gpt-oss-20b``. Eager is transformers' own default, which multiplies by ``grouped_mm``. Methods are
``full``, ``lora`` (rank 16 on the attention's projections) and ``experts`` (on all linear layers
and the experts). A step is forward, backward and AdamW; both sides step in turn on the same
batches, and the medians are compared.
``growth_mb`` is the highest resident memory of a step above that before it. Time is what the clock
shows, or with ``--cpu-time`` what the process used: that is fair on a busy machine, with one
thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from environment import describe
from fusewright import explain, optimize
from worker import Memory

EXPERTS, HIDDEN, INNER, VOCAB = 64, 256, 512, 2048
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {**SMALL, "intermediate_size": INNER, "num_local_experts": EXPERTS,
         "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {**SMALL, "moe_intermediate_size": INNER, "num_experts": EXPERTS,
         "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {"num_hidden_layers": 1, "hidden_size": 2048, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
         "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "gpt-oss-20b": (
        "GptOss",
        {"num_hidden_layers": 1, "hidden_size": 2880, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
         "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype) -> Any:
    """The model with random weights."""
    import transformers

    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **sizes, vocab_size=VOCAB, use_cache=False, max_position_embeddings=8192
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def adapted(model: Any, **config: Any) -> Any:
    """The model with frozen weights, and LoRA of rank 16 with this configuration of PEFT's."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, **config))
    with torch.no_grad():  # as after some steps: with zeros the A's have no gradients
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return adapted


def copied(model: Any) -> Any:
    """A copy that shares the frozen weights."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


class Side:
    """One model with its optimizer, and the times and losses of its steps."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.growths: list[float] = []

    def step(self, inputs: Mapping[str, Tensor]) -> None:
        """One full training step."""
        memory = Memory("cpu")
        start = self.clock()
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(self.clock() - start)
        self.growths.append(memory.peak()["rss_mb"] - memory.loaded["rss_mb"])
        self.losses.append(float(loss.detach()))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Step both models in turn; return the figures."""
    model = build(args.model, getattr(torch, args.dtype))
    if args.method == "lora":
        model = adapted(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    elif args.method == "experts":  # which PEFT's own list does not have for every model
        stacks = ["experts.gate_up_proj", "experts.down_proj"]
        model = adapted(model, target_modules="all-linear", target_parameters=stacks)
    batches = torch.randint(VOCAB, (args.warmup + args.steps, args.batch, args.seq))
    return in_turn(model, [{"input_ids": ids, "labels": ids} for ids in batches], args)


def in_turn(
    model: Any, batches: Sequence[Mapping[str, Tensor]], args: argparse.Namespace
) -> dict[str, Any]:
    """Step the model in eager mode and optimized, in turn; return the figures."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    sides = {
        "eager": Side(copied(model), clock),
        "fusewright": Side(optimize(model, codegen=args.codegen), clock),
    }
    for number, inputs in enumerate(batches):
        for side in list(sides.values())[:: 1 if number % 2 else -1]:
            side.step(inputs)
    medians = {n: statistics.median(s.seconds[args.warmup :]) for n, s in sides.items()}
    growth = {n: statistics.median(s.growths[args.warmup :]) for n, s in sides.items()}
    best = {n: min(s.seconds[args.warmup :]) for n, s in sides.items()}
    losses = {n: s.losses for n, s in sides.items()}
    return {
        **{k: v for k, v in vars(args).items() if k != "json"},
        "median_ms": {n: round(1e3 * t, 1) for n, t in medians.items()},
        "minimum_ms": {n: round(1e3 * t, 1) for n, t in best.items()},
        "ratio_of_medians": round(medians["eager"] / medians["fusewright"], 3),
        "ratio_of_minima": round(best["eager"] / best["fusewright"], 3),
        "growth_mb": {n: round(mb) for n, mb in growth.items()},
        "ratio_of_growths": round(growth["fusewright"] / growth["eager"], 3),
        "losses": losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "rewrites": explain(sides["fusewright"].model).by_rule(),
    }


def arguments(about: str, models: Sequence[str]) -> argparse.ArgumentParser:
    """What the command line of both programs has."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--codegen", choices=("eager", "inductor", "auto"), default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def run(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Parse the command line, measure, print."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures = measure(args)
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**figures, **describe()}, indent=1) + "\n")


if __name__ == "__main__":
    parser = arguments(__doc__, tuple(MODELS))
    parser.add_argument("--method", choices=("full", "lora", "experts"), default="full")
    parser.add_argument("--seq", type=int, default=256)
    run(parser, measure)
