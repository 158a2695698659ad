"""How cost grows with the model and the number of devices, as ``fusewright plan`` sees it.

    python benchmarks/scaling.py --card H100 --worlds 8,64,256,1024

No weights are read, and nothing is trained: the sizes are those of Llama 3.1 (8B, 70B, 405B), one
sequence of 8,192 tokens for each process, bf16, AdamW, FSDP2, and HSDP with eight devices a copy.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from fusewright.memory.budget import GB
from fusewright.train.plan.cards import parse_devices
from fusewright.train.plan.count.layout import ProcessLayout
from fusewright.train.plan.count.network import traffic
from fusewright.train.plan.estimate import TrainingJob, estimate
from fusewright.train.plan.plan import make_job
from fusewright.train.plan.search import fits
from fusewright.train.plan.speed import speed
from fusewright.train.recipe.load import check
from fusewright.train.recipe.recipe import Recipe

SIZES = {
    "8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128),
}  # fmt: skip
"""Hidden and inner size, blocks, heads."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": "lora", "lora_r": 16, "lora_target_linear": True},
    "QLoRA": {"adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_target_linear": True},
}


def write(folder: Path, size: str, method: str) -> Recipe:
    """A recipe for a folder with nothing but a configuration."""
    hidden, inner, depth, heads = SIZES[size]
    model = folder / size
    LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256,
        tie_word_embeddings=False, max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(model)  # fmt: skip
    keys = {
        "base_model": str(model), "datasets": [{"path": "rows.jsonl"}], "bf16": True,
        "sequence_len": 8192, "memory": "auto", "output_dir": str(folder / "out"),
        **METHODS[method],
    }  # fmt: skip
    return check(keys, with_data=False).recipe


def row(job: TrainingJob, layout: ProcessLayout, gpus: str) -> list[str]:
    """Peak, what blocks keep, bytes sent, seconds, tokens/s for each device."""
    devices = parse_devices(gpus)
    room = devices.card.memory
    memory = estimate(job, layout, room)
    hidden = int(job.blueprint.model.get_input_embeddings().weight.shape[1])
    sent = traffic(job.units, layout, 1, job.step.tokens, hidden)
    found = speed(job, memory, layout, sent, devices.card)
    if not fits(job, layout, room):
        return [f"{memory.peak / GB:,.0f} (no)", "", "", "", ""]
    return [
        f"{memory.peak / GB:,.1f}", ", ".join(memory.levels), f"{sent.total / 1e9:,.1f}",
        f"{found.seconds:,.2f}", f"{found.tokens_per_second / layout.world:,.0f}",
    ]  # fmt: skip


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="H100")
    parser.add_argument("--worlds", default="8,64,256,1024")
    parser.add_argument("--sizes", default="8B,70B,405B")
    args = parser.parse_args()
    heads = (
        "model",
        "method",
        "devices",
        "sharded",
        "GiB",
        "blocks keep",
        "GB sent",
        "s",
        "tokens/s",
    )
    print(f"| {' | '.join(heads)} each |\n|{'---|' * len(heads)}")
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes.split(","):
            for method in METHODS:
                job = make_job(write(Path(name), size, method), torch.bfloat16, on_cpu=False)
                for world in map(int, args.worlds.split(",")):
                    ways = {"FSDP2": ProcessLayout("FSDP2", world, shard=world)}
                    if world > 8:
                        ways["HSDP"] = ProcessLayout("HSDP", world, shard=8, replicate=world // 8)
                    for way, layout in ways.items():
                        cells = row(job, layout, f"{world}x{args.card}")
                        print(
                            f"| {' | '.join((size, method, str(world), way, *cells))} |", flush=True
                        )


if __name__ == "__main__":
    main()
