"""``kill -9`` at any moment, also while a checkpoint is written: the run goes on as if nothing was.

The seed of the moments is new each time, and printed: ``FUSEWRIGHT_TEST_SEED`` repeats one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusewright.train.checkpoint.files import checkpoints, step_of

from ...load import stretched

BEGUN = "training for"


class Process:
    """``fusewright train`` in a process of its own."""

    def __init__(self, recipe: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "fusewright.cli", "train", str(recipe)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.said: list[str] = []
        self.begun = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.said.append(line)
            if BEGUN in line:
                self.begun.set()
        self.begun.set()

    def end(self, kill: bool) -> int:
        if kill:
            self.popen.kill()
        code = self.popen.wait(timeout=stretched(600))
        self.reader.join()
        return code


def require_loadable(folder: Path) -> None:
    """Read every file of every checkpoint."""
    for path in checkpoints(folder):
        step = step_of(path)
        assert load_file(path / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert torch.load(path / name, weights_only=False)
        for name in ("fusewright.json", "trainer_state.json", "adapter_config.json"):
            content = json.loads((path / name).read_text(encoding="utf-8"))
            assert content.get("global_step", step) == step
    assert {p.name for p in folder.glob("checkpoint-*")} == {p.name for p in checkpoints(folder)}


def finished(folder: Path) -> bool:
    """Whether all was done, if only the process had not ended."""
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return False
    return bool(status == "finished")


@pytest.mark.parametrize(
    ("kills", "steps", "every", "limit", "later"),
    [
        pytest.param(2, 40, 1, 2, False, marks=pytest.mark.long),
        pytest.param(20, 400, 1, 2, False, marks=pytest.mark.slow),
        pytest.param(8, 160, 2, 1, False, marks=pytest.mark.slow),
        pytest.param(6, 120, 2, 1, True, marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments(
    recipe: dict[str, Any], tmp_path: Path, kills: int, steps: int, every: int, limit: int,
    later: bool,
) -> None:  # fmt: skip
    seed = int(os.environ.get("FUSEWRIGHT_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    moments = random.Random(seed)
    asked = {
        **recipe,
        "max_steps": steps,
        "lora_dropout": 0.2,
        "lr_scheduler": "cosine",
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "micro_batch_size": 1,
        "logging_steps": 7,
        "save_steps": every,
        "save_total_limit": limit,
        "async_save": later,
        "auto_resume_from_checkpoints": True,
    }
    files = []
    for name in ("whole", "killed"):
        files.append(tmp_path / f"{name}.yaml")
        asked["output_dir"] = str(tmp_path / name)
        files[-1].write_text(yaml.safe_dump(asked), encoding="utf-8")
    asked_at = time.perf_counter()
    whole = Process(files[0])
    whole.begun.wait()
    started = time.perf_counter()
    assert whole.end(kill=False) == 0, "".join(whole.said)
    length = time.perf_counter() - started
    folder = tmp_path / "killed"
    reached, saving = [], 0
    for number in range(kills):
        process = Process(files[1])
        if number % 5:
            process.begun.wait()
            # less than the whole length in all: a later run may be the faster one
            time.sleep(moments.uniform(0, 1.5 * length / kills))
        else:  # also before it trains
            time.sleep(moments.uniform(0, started - asked_at))
        code = process.end(kill=True)
        if code == 0 or finished(folder):  # it was faster: nothing is left to kill
            break
        assert code == -9, "".join(process.said)
        require_loadable(folder)
        there = checkpoints(folder)
        reached.append(step_of(there[-1]) if there else 0)
        saving += bool(list(folder.glob(".checkpoint-*")))
    print(f"killed after the checkpoints {reached}, {saving} times while saving")
    assert reached == sorted(reached)
    last = Process(files[1])
    code = last.end(kill=False)
    result = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    # when it was done before the last kill, there is nothing to go on with
    assert code == 0 or (code == 2 and len(reached) < kills), "".join(last.said)
    assert (result["status"], result["steps"]) == ("finished", steps)
    assert not list(folder.glob(".*"))
    one, other = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    expected = json.loads((tmp_path / "whole" / "run.json").read_text(encoding="utf-8"))
    for key in ("loss", "grad_norm", "learning_rate"):
        curves = [[(e["step"], e[key]) for e in run["history"] if key in e]
                  for run in (expected, result)]  # fmt: skip
        assert curves[0] == curves[1]
    assert result["val_loss_after"] == expected["val_loss_after"]
    assert len(reached) >= kills / 2, "too fast to be killed: give it more steps"
