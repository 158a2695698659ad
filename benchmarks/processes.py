"""Train a small model in several processes, and compare with one: losses, rewrites, kills.

    python benchmarks/processes.py table --json table.json
    python benchmarks/processes.py table --cells fsdp-lora,zero3-full --codegen eager
    python benchmarks/processes.py kills --number 20 --cell ddp-lora

``table``: every strategy with every method, in eager mode and optimized, ten steps each; how far
the losses are from those of one process with the same batches, and what was rewritten. ``kills``: a
run is killed at random moments, one process at a time, and resumed, until it ends; its weights are
compared with those of a run that was left alone. Seconds and memory: ``processes_cost.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "learning_rate": 1e-2},
    "qlora": {
        "adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_target_linear": True,
        "learning_rate": 1e-2,
    },
}  # fmt: skip
_FSDP = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
_SHARDS = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp": (2, _FSDP),
    "shards": (2, _SHARDS),
    "hsdp": (4, {**_FSDP, "dp_shard_size": 2, "dp_replicate_size": 2}),
    "zero1": (2, {"deepspeed": "deepspeed_configs/zero1.json"}),
    "zero2": (2, {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    "zero3": (2, {"deepspeed": "deepspeed_configs/zero3.json"}),
}
"""The number of processes, and the keys of the recipe. ``shards`` is FSDP2 that saves in shards."""


@dataclass
class Cell:
    """One run beside that of one process.

    Attributes:
        strategy: how the work was shared.
        method: what was trained.
        optimized: whether the model was optimized.
        processes: how many there were.
        difference: the largest difference of a step's loss from one process's; None: it failed.
        rewrites: sites that one process rewrites, and rank 0 does, too (other ranks are the same,
            or ``note`` says so).
        expected: sites that one process rewrites.
        note: why it failed, or which ranks differ.
    """

    strategy: str
    method: str
    optimized: bool
    processes: int
    difference: float | None = None
    rewrites: int = 0
    expected: int = 0
    note: str = ""


def prepare(folder: Path) -> Path:
    """Write a tiny model, its tokenizer and rows; returns the recipe that trains it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.train.conftest import chat, make_model, make_tokenizer

    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = [chat(f"What is {i}?", f"It is the number {i}, " * (1 + i % 3)) for i in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base_model": str(folder / "base"), "bf16": False, "micro_batch_size": 2,
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "val_set_size": 9, "sequence_len": 128, "max_steps": STEPS, "logging_steps": 1,
        "optimizer": "adamw_torch", "codegen": "eager", "save_strategy": "no",
        "dataset_prepared_path": str(folder / "prepared"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe: Path, processes: int, passes: int, output: Path, **keys: Any) -> list[str]:
    """The command that trains ``recipe`` with more keys."""
    own = yaml.safe_load(recipe.read_text())
    own |= {"gradient_accumulation_steps": passes, "output_dir": str(output)}
    given = {**own, **keys}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(given))
    words = [sys.executable, "-P", "-m", "fusewright.cli", "train", str(path)]
    return [*words, "--nproc", str(processes)]


def run(words: list[str], output: Path, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Run a command; returns its ``run.json``, and the end of what it printed."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"not done after {seconds:.0f} s"
    said = [line for line in done.stderr.splitlines() if line.startswith("fusewright")]
    if not (output / "run.json").exists():
        return None, (said or done.stderr.splitlines() or ["?"])[-1]
    differing = [line for line in done.stdout.splitlines() if "has other rewrites" in line]
    return json.loads((output / "run.json").read_text()), "; ".join(differing)


def losses(result: dict[str, Any]) -> list[float]:
    """The logged losses."""
    return [entry["loss"] for entry in result["history"] if "loss" in entry]


def rewritten(result: dict[str, Any]) -> Counter[str]:
    """How many sites each rule has rewritten."""
    return Counter((result["optimize"] or {"by_rule": {}})["by_rule"])


def table(folder: Path, wanted: list[str] | None, seconds: float) -> list[Cell]:
    """Run the cells, and print each as it ends."""
    recipe, alone, cells = prepare(folder), {}, []
    for method, keys in METHODS.items():
        for name, (processes, shared) in STRATEGIES.items():
            if wanted and f"{name}-{method}" not in wanted:
                continue
            for optimized in (False, True):
                base = method, optimized, processes
                if base not in alone:
                    output = folder / f"one-{method}-{optimized}-{processes}"
                    words = command(recipe, 1, processes, output, optimize=optimized, **keys)
                    alone[base] = run(words, output, seconds)[0]
                cell = Cell(name, method, optimized, processes)
                output = folder / f"{name}-{method}-{optimized}"
                given = {**keys, **shared, "optimize": optimized}
                found, cell.note = run(
                    command(recipe, processes, 1, output, **given), output, seconds
                )
                expected = alone[base]
                if found is not None and expected is not None:
                    pairs = zip(losses(found), losses(expected), strict=True)
                    cell.difference = max(abs(a - b) for a, b in pairs)
                    both = rewritten(found) & rewritten(expected)
                    cell.rewrites, cell.expected = both.total(), rewritten(expected).total()
                cells.append(cell)
                print(_line(cell), flush=True)
    return cells


def _line(cell: Cell) -> str:
    how = "optimized" if cell.optimized else "eager"
    far = "failed" if cell.difference is None else f"{cell.difference:.1e}"
    kept = f"{cell.rewrites} of {cell.expected}" if cell.optimized else "-"
    name = f"{cell.strategy} ({cell.processes})"
    return f"| {name} | {cell.method} | {how} | {far} | {kept} | {cell.note} |"


def kills(folder: Path, cell: str, number: int, seed: int) -> bool:
    """Kill a random process of a run at random moments; whether the weights are the same."""
    import torch
    from safetensors.torch import load_file

    strategy, method = cell.split("-")
    processes, shared = STRATEGIES[strategy]
    recipe, draw = prepare(folder), random.Random(seed)
    keys = {
        **METHODS[method], **shared, "max_steps": 100, "save_steps": 2, "save_total_limit": 2,
        "save_strategy": "steps", "auto_resume_from_checkpoints": True, "optimize": False,
        "lora_dropout": 0.1 if method == "lora" else None, "val_set_size": 0,
    }  # fmt: skip
    start = time.time()
    run(command(recipe, processes, 1, folder / "alone", **keys), folder / "alone", 600)
    most = 0.6 * (time.time() - start)
    one, killed, same = load_file(folder / "alone" / _NAMES[method]), 0, True
    while killed < number:
        output = folder / f"killed-{killed}"
        words = command(recipe, processes, 1, output, **keys)
        code = 1
        while code != 0:
            wait = draw.uniform(0, most) if killed < number else None
            code, hit = attempt(words, processes, wait, draw)
            killed += hit
            steps = sorted(int(p.name.split("-")[1]) for p in output.glob("checkpoint-*"))
            print(f"kills: {killed}, exit {code}, checkpoints {steps}", flush=True)
        other = load_file(output / _NAMES[method])
        same &= all(torch.equal(one[key], other[key]) for key in one)
        print(f"{killed} kills; weights equal, bit for bit: {same}", flush=True)
    return same


_NAMES = dict.fromkeys(METHODS, "adapter_model.safetensors") | {"full": "model.safetensors"}


def attempt(
    words: list[str], processes: int, wait: float | None, draw: random.Random
) -> tuple[int, bool]:
    """Start a run, and kill one of its processes; returns its exit code, and whether that was."""
    process = subprocess.Popen(words, stdout=-3, stderr=-3)
    ranks: list[int] = []
    while process.poll() is None and len(ranks) < processes:
        time.sleep(0.1)
        ranks = children(process.pid)
    try:
        return process.wait(wait), False
    except subprocess.TimeoutExpired:
        try:
            os.kill(draw.choice(ranks), signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            return process.wait(40), False
        return process.wait(40), True


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def main() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "kills"])
    parser.add_argument("--cells", help="such as fsdp-lora,zero3-full; default: all")
    parser.add_argument("--cell", default="ddp-lora", help="of kills")
    parser.add_argument("--number", type=int, default=20, help="of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=240, help="that a run may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        if args.what == "kills":
            raise SystemExit(not kills(Path(name), args.cell, args.number, args.seed))
        wanted = args.cells.split(",") if args.cells else None
        print(
            "| strategy | method | mode | loss difference | rewrites | |\n|---|---|---|---|---|---|"
        )
        cells = table(Path(name), wanted, args.seconds)
        if args.json:
            args.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))


if __name__ == "__main__":
    main()
