"""Bytes of a training step of packs, by the tokens of a row, in eager code and optimized.

    python benchmarks/pack_memory.py [--models tiny,smollm2] [--tokens 2048,4096,8192,16384]

A row is packed from samples of at most 1,024 tokens. A step is forward and backward of two layers
in bf16 with gradients of all weights; what it holds at its highest, above what was there before, is
added up from PyTorch's profiler. What C++ kernels hold by themselves is not in it: packed keys and
values, linear in tokens. ``largest`` is the largest piece of memory.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from environment import describe
from fusewright import optimize
from fusewright.kernels.attention import attention as _attention  # noqa: F401  # defines the ops

MODELS = {
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip
ENGINES = ("eager", "fusewright")


def main() -> None:
    """Measure, and print a line for each model, engine and length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=lambda t: t.split(","), default=list(MODELS))
    parser.add_argument("--engines", type=lambda t: t.split(","), default=list(ENGINES))
    parser.add_argument("--tokens", type=lambda t: list(map(int, t.split(","))),
                        default=[2048, 4096, 8192, 16384])  # fmt: skip
    options = parser.parse_args()
    print(describe(), flush=True)
    for name in options.models:
        for engine in options.engines:
            for tokens, peak, largest in measured(name, engine, options.tokens):
                print(
                    f"{name} {engine} {tokens:,}: {peak:,} bytes, largest {largest:,}", flush=True
                )


def measured(name: str, engine: str, lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Tokens of a row, the peak of a step, and its largest piece of memory."""
    torch.manual_seed(0)
    sizes = {**MODELS[name], "num_hidden_layers": 2, "max_position_embeddings": 1024}
    config = transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().train()
    if engine != "eager":
        optimize(model, codegen="eager")
    batches = [(tokens, batch(tokens, config.vocab_size)) for tokens in lengths]
    step(model, batches[0][1])  # captures and compiles; gradients are there from now on
    for tokens, each in batches:
        gc.collect()
        yield tokens, *allocated(lambda: step(model, each))  # noqa: B023


def batch(tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """One row of samples of 64 to 1,024 tokens."""
    draws, lengths = random.Random(tokens), [0]
    while sum(lengths) < tokens:
        lengths.append(min(draws.randint(64, 1024), tokens - sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def step(model: Any, inputs: dict[str, Tensor]) -> None:
    """Forward and backward."""
    model(**inputs, use_cache=False).loss.backward()


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """The bytes that ``run`` holds at its highest, above those before, and its largest piece."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    pieces = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = highest = 0
    for _, size in sorted(pieces):
        total += size
        highest = max(highest, total)
    return highest, max(size for _, size in pieces)


if __name__ == "__main__":
    main()
