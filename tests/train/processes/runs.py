"""Whole runs of the tiny model in several processes, by the command, and what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from torch import Tensor

from fusewright.train import train
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.run import TrainingRun

from ...load import stretched
from ..conftest import numbers, small_recipe, write_rows
from ..results import weights
from .ranks import values

LIMIT = 300.0
"""Seconds after which a command and its processes are killed, on an idle machine."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": ["full_shard", "auto_wrap"]},
    "fsdp, gathered": {"fsdp_config": {"reshard_after_forward": False}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
                "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
                "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
            }
        }
        for stage in (1, 2, 3)
    },
}  # fmt: skip


class Run:
    """A run that has ended: its exit code, what it has printed, and its folder."""

    def __init__(self, folder: Path, code: int, out: str, err: str) -> None:
        self.folder, self.code, self.out, self.err = folder, code, out, err

    @property
    def text(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        return found

    def curve(self, key: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[key]) for entry in self.json["history"] if key in entry]

    def weights(self) -> dict[str, Tensor]:
        return weights(self.folder)


class Runs:
    """Starts runs of one recipe, in a folder of their own.

    Args:
        base: the folder of the tiny model.
        folder: where to.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.rows = write_rows(folder / "rows.jsonl", numbers())
        self._alone: dict[str, Run] = {}
        self._several: dict[str, Run] = {}

    def recipe(self, name: str, **keys: Any) -> dict[str, Any]:
        """Two epochs of 15 batches, so that those of two processes do not go round."""
        common = small_recipe(self.base, self.rows, self.folder / name)
        del common["max_steps"]
        common |= {
            "sample_packing": False, "val_set_size": 10, "num_epochs": 2, "eval_steps": 4,
            "logging_steps": 1, "dataset_prepared_path": str(self.folder / "prepared"),
        }  # fmt: skip
        return {**common, **keys}

    def start(
        self,
        name: str,
        *arguments: str,
        python: Sequence[str] = (sys.executable,),
        streams: str | None = None,
        **keys: Any,
    ) -> subprocess.Popen[str]:
        """Start the command; what it prints goes to ``NAME.out`` and ``NAME.err``.

        Args:
            name: of the recipe and of the folder that it writes.
            arguments: of the command.
            python: what runs the command's module.
            streams: another name for what it prints.
            keys: of the recipe.
        """
        path, streams = self.folder / f"{name}.yaml", streams or name
        path.write_text(yaml.safe_dump(self.recipe(name, **keys)), encoding="utf-8")
        command = [*python, "-m", "fusewright.cli", "train", str(path), *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (
            (self.folder / f"{streams}.out").open("w") as out,
            (self.folder / f"{streams}.err").open("w") as err,
        ):
            return subprocess.Popen(command, stdout=out, stderr=err, env=environ, text=True)

    def end(
        self,
        name: str,
        process: subprocess.Popen[str],
        limit: float = LIMIT,
        streams: str | None = None,
    ) -> Run:
        """Wait for a command that was started; if it hangs, it fails."""
        try:
            code = process.wait(stretched(limit))
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            kill_tree(process)
        texts = [(self.folder / f"{streams or name}.{kind}").read_text() for kind in ("out", "err")]
        return Run(self.folder / name, code, *texts)

    def several(self, name: str, processes: int = 2, **keys: Any) -> Run:
        """A run in several processes, which must end well; made once for each name."""
        if name not in self._several:
            run = self.end(name, self.start(name, "--nproc", str(processes), **keys))
            assert run.code == 0, run.text
            self._several[name] = run
        return self._several[name]

    def forked(self, name: str, processes: int = 2, **keys: Any) -> Run:
        """The same in forks, which import nothing, for tests that are not of the command."""
        if name not in self._several:
            values(train_rank, self.recipe(name, **keys), size=processes, limit=LIMIT)
            self._several[name] = Run(self.folder / name, 0, "", "")
        return self._several[name]

    def alone(self, passes: int = 2, **keys: Any) -> Run:
        """The run of one process that makes so many forward passes per step."""
        name = f"alone-{passes}-{len(self._alone)}"
        known = json.dumps([passes, keys], sort_keys=True)
        if known not in self._alone:
            asked = self.recipe(name, gradient_accumulation_steps=passes, **keys)
            result = train(asked, console=Console(quiet=True))
            self._alone[known] = Run(self.folder / name, result.exit_code, "", "")
        return self._alone[known]


def train_rank(world: World, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a recipe as one of several processes; its history."""
    recipe = load_recipe(keys)
    recipe.strategy().require_world(world.size)
    world.share_batches(recipe.strategy().group)
    return TrainingRun(recipe, Console(quiet=True), world).run().history


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill a command and the processes that it has started."""
    found: list[psutil.Process] = []
    if process.poll() is None:
        found = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    for child in found:
        if child.is_running():
            child.kill()


def launched_with(code: str, *arguments: str, processes: int = 2) -> tuple[int, str]:
    """Launch the command in several processes that first run ``code``; its exit code and output.

    Args:
        code: patches what it likes; it knows ``rank``.
        arguments: of the command.
        processes: how many.
    """
    with tempfile.TemporaryDirectory() as folder:
        stub, output = Path(folder, "python"), Path(folder, "output")
        stub.write_text(_STUB + code + _MAIN, encoding="utf-8")
        stub.chmod(0o755)
        command = [sys.executable, "-c", _LAUNCH, str(stub), str(processes), *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environ, text=True)
        try:
            code_ = process.wait(stretched(LIMIT))
        except subprocess.TimeoutExpired:
            code_ = 124
        finally:
            kill_tree(process)
        return code_, output.read_text()


_STUB = f"""#!{sys.executable}
import os, signal, sys
sys.argv = ["fusewright", *sys.argv[4:]]  # without -P -m fusewright.cli
rank = int(os.environ["RANK"])
"""
_MAIN = "\nfrom fusewright.cli import main\nmain()\n"
_LAUNCH = """
import sys
from fusewright.train.processes.launch import launch
sys.executable, number, *arguments = sys.argv[1:]
sys.exit(launch(int(number), arguments))
"""
