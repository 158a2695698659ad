"""What ``python -m benchmarks`` measures: each comparison once, with the file that it writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One program's run.

    Attributes:
        name: of its file among the results, without the suffix.
        title: what it measures.
        program: the file beside this one.
        arguments: of its command line.
        small: those that replace them to try the program; no figure of these means anything.
        minutes: about, on two cores.
        engines: those that it takes, if it takes any.
        peers: whether the peers whose environments are there come behind them.
    """

    name: str
    title: str
    program: str
    arguments: str
    small: str
    minutes: int
    engines: str = ""
    peers: bool = False

    def command(self, quick: bool = False, more: tuple[str, ...] = ()) -> list[str]:
        """The program and its arguments."""
        given = (self.small if quick else self.arguments).split()
        more = more if self.peers else ()
        engines = ",".join([*self.engines.split(","), *more]) if self.engines else ""
        return [self.program, *given, *(["--engines", engines] if engines else [])]


_STEP = "--model smollm2 --batch 4 --seq 256 --dtype"
_LARGE = "--model smollm2 --dtype bfloat16 --batch 8 --seq 512 --steps 3 --warmup 1"
_TINY = "--model tiny-llama --dtype float32 --batch 2 --seq 16 --steps 1 --warmup 1"

SUITE = (
    Measurement(
        "train_step-smollm2-bf16-cpu", "training step, bf16, 4 x 256", "train_step.py",
        f"{_STEP} bfloat16", _TINY, 12, "eager,compile,compile-regional,trl,fusewright",
    ),
    Measurement(
        "train_step-smollm2-fp32-cpu", "training step, fp32, 4 x 256", "train_step.py",
        f"{_STEP} float32", _TINY, 12, "eager,compile,compile-regional,trl,fusewright",
    ),
    Measurement(
        "train_step-smollm2-bf16-8x512-memory-cpu", "training step and memory, bf16, 8 x 512",
        "train_step.py", _LARGE, _TINY, 12, "hf,hf+gc,trl,fusewright,fusewright:min",
    ),
    Measurement(
        "train_step-smollm2-qlora-bf16-4x256-cpu", "training step over NF4 weights, bf16, 4 x 256",
        "train_step.py", f"{_STEP} bfloat16 --method qlora", f"{_TINY} --method qlora", 6,
        "hf,fusewright",
    ),
    Measurement(
        "training-smollm2-bf16-cpu", "whole runs on the quickstart's rows", "training.py", "",
        "--rows 8 --validation-rows 2 --batch 4 --sequence-len 128", 25,
        "stock,stock+gc,stock-packed,trl,trl-nogc,fusewright,fusewright:min",
    ),
    Measurement(
        "training-peers-smollm2-bf16-cpu", "the same beside peers", "training.py", "",
        "--rows 8 --validation-rows 2 --batch 4 --sequence-len 128", 25,
        "stock,fusewright,fusewright:min", True,
    ),
    Measurement(
        "preferences-smollm2-bf16-cpu", "steps of DPO, KTO, ORPO, reward models and GRPO",
        "preferences.py", "--methods dpo,kto,orpo,reward,grpo --batch 8 --seq 512 --threads 1",
        "--methods dpo --batch 2 --seq 64 --steps 2 --model tiny-llama --dtype float32", 60,
    ),
    Measurement(
        "preparation-cpu", "10,000 chats to tokens and masks", "preparation.py", "",
        "--rows 50 --repeat 1", 2,
    ),
    Measurement(
        "longest-smollm2-bf16-cpu", "the longest sequence of a memory budget", "longest.py",
        "--model smollm2 --budgets 1.5GB,2GB --step 256 --most 6144 --verify",
        "--model tiny-llama --budgets 1GB --step 64 --most 128 --reference 64", 15,
    ),
    Measurement(
        "first_step-smollm2-cpu", "the first step, with an empty cache and a full one",
        "first_step.py", "--ranks 1 --codegen inductor --model smollm2 --again",
        "--ranks 1 --codegen eager --model tiny-llama", 4,
    ),
    Measurement(
        "curves-cpu", "speed by tokens, batch, vocabulary, layers, rank and packing", "curves.py",
        "", "--axes rank --model tiny-llama --values 4 --batch 1 --seq 16 --steps 1", 40,
    ),
    Measurement(
        "moe-qwen3-moe-lora-bf16-cpu", "steps of 64 experts", "moe.py",
        "--model qwen3-moe --method lora --batch 4 --seq 512 --dtype bfloat16",
        "--model qwen3-moe --method lora --batch 1 --seq 16 --steps 1 --warmup 1 --codegen eager",
        6,
    ),
    Measurement(
        "soak-lora-cpu", "2,000 steps of LoRA", "soak.py", "--method lora",
        "--method lora --steps 12 --every 6 --settled 2", 10,
    ),
    Measurement(
        "soak-qlora-cpu", "2,000 steps of QLoRA", "soak.py", "--method qlora",
        "--method qlora --steps 12 --every 6 --settled 2", 10,
    ),
)  # fmt: skip
"""In the order in which they run."""


def named(names: list[str]) -> list[Measurement]:
    """Those whose names begin so; all of them where none is given.

    Raises:
        ValueError: no measurement has such a name.
    """
    for name in names:
        if not any(m.name.startswith(name) for m in SUITE):
            known = ", ".join(m.name for m in SUITE)
            raise ValueError(f"no measurement is named {name!r}; there are {known}")
    return [m for m in SUITE if not names or any(m.name.startswith(n) for n in names)]
