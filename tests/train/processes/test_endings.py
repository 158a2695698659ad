"""Runs of several processes that end early: by a signal, a kill, a full disk, or a NaN loss.

The seed of the moments is new each time, and printed: ``FUSEWRIGHT_TEST_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from fusewright.train.checkpoint.files import checkpoints, step_of

from ...load import Limit, stretched
from ..results import difference, same
from .runs import STRATEGIES, Run, Runs, launched_with

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "max_steps": 40, "num_epochs": None, "save_steps": 3, "eval_steps": None, "val_set_size": 0,
    "lora_dropout": 0.2, "lr_scheduler": "cosine", "weight_decay": 0.1, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("endings"))


def moments() -> random.Random:
    seed = int(os.environ.get("FUSEWRIGHT_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    return random.Random(seed)


def _until(process: subprocess.Popen[str], folder: Path, step: int) -> dict[int, psutil.Process]:
    """Wait for a checkpoint; returns the processes of the run by rank."""
    end = Limit(200)
    while end.left() and process.poll() is None:
        there = checkpoints(folder) if folder.exists() else []
        if there and (step_of(there[-1]) or 0) >= step:
            break
        time.sleep(0.02)
    children = psutil.Process(process.pid).children() if process.poll() is None else []
    ranks = {int(child.environ()["RANK"]): child for child in children}
    assert sorted(ranks) == [0, 1], "it has ended too soon"
    return ranks


def _gone(processes: list[psutil.Process], limit: float) -> list[psutil.Process]:
    """Those that are still there after some time, killed now."""
    _, left = psutil.wait_procs(processes, timeout=stretched(limit))
    for process in left:
        process.kill()
    return list(left)


def _assert_whole(run: Run) -> None:
    """Whatever is called a checkpoint can be loaded."""
    for path in checkpoints(run.folder):
        assert load_file(path / "adapter_model.safetensors")
        for name in ("optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "fusewright.json"):
            assert (path / name).stat().st_size > 0


@pytest.mark.parametrize(("name", "kills"), [("ddp", 2), ("fsdp", 1)])
def test_a_process_that_is_killed_ends_the_run_which_resumes(
    runs: Runs, name: str, kills: int
) -> None:
    keys = {**LONG, **STRATEGIES[name], "auto_resume_from_checkpoints": True}
    whole, random_ = runs.several(f"whole, {name}", **keys), moments()
    folder = f"killed, {name}"
    for _ in range(kills):
        process = runs.start(folder, "--nproc", "2", **keys)
        there = checkpoints(runs.folder / folder) if (runs.folder / folder).exists() else []
        before = step_of(there[-1]) or 0 if there else 0
        ranks = _until(process, runs.folder / folder, before + random_.randrange(3, 13))
        time.sleep(random_.uniform(0, 0.2))
        which = random_.randrange(2)
        ranks[which].kill()
        begun = time.monotonic()
        run = runs.end(folder, process)
        assert time.monotonic() - begun < 30
        assert run.code == 137, run.text
        said = f"rank {which} (process {ranks[which].pid}) was killed by SIGKILL"
        assert said in run.err
        assert "auto_resume_from_checkpoints: true" in run.err
        assert "Traceback" not in run.text
        assert "may be a bug" not in run.text
        assert not _gone(list(ranks.values()), 1)
        _assert_whole(run)
    last = runs.end(folder, runs.start(folder, "--nproc", "2", **keys))
    assert last.code == 0, last.text
    assert same(last.weights(), whole.weights())
    for key in ("loss", "grad_norm", "learning_rate"):
        assert last.curve(key) == whole.curve(key)
    assert last.json["trained_tokens"] == whole.json["trained_tokens"]


@pytest.mark.parametrize(
    ("name", "to"), [("ddp", "launcher"), ("ddp", "rank 1"), ("fsdp", "launcher")]
)
def test_a_signal_ends_it_in_order_and_it_resumes(runs: Runs, name: str, to: str) -> None:
    keys = {**LONG, **STRATEGIES[name], "auto_resume_from_checkpoints": True}
    whole = runs.several(f"whole, {name}", **keys)
    folder = f"signalled, {name}, {to}"
    process = runs.start(folder, "--nproc", "2", **keys)
    ranks = _until(process, runs.folder / folder, moments().randrange(3, 22))
    (process if to == "launcher" else ranks[1]).send_signal(signal.SIGTERM)
    run = runs.end(folder, process)
    assert run.code == 143, run.text
    found = run.json
    assert (found["status"], found["signal"]) == ("interrupted", signal.SIGTERM)
    assert 3 <= found["steps"] < LONG["max_steps"]
    assert found["checkpoint"].endswith(f"checkpoint-{found['steps']}")
    assert run.out.count("Stopped by SIGTERM.") == 1
    assert run.err.count("Stopping after this step and saving") == (to == "launcher")
    assert "Traceback" not in run.text
    assert not _gone(list(ranks.values()), 1)
    _assert_whole(run)
    stopped = load_file(Path(found["checkpoint"]) / "adapter_model.safetensors")
    assert same(run.weights(), stopped)
    last = runs.end(folder, runs.start(folder, "--nproc", "2", **keys))
    assert last.code == 0, last.text
    assert last.json["resumed_from"] == found["steps"]
    assert same(last.weights(), whole.weights())
    assert last.curve("loss") == whole.curve("loss")


def test_two_signals_quit_at_once(runs: Runs) -> None:
    process = runs.start("quit", "--nproc", "2", **LONG)
    ranks = _until(process, runs.folder / "quit", 3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    run = runs.end("quit", process)
    assert run.code == 130, run.text
    assert not _gone(list(ranks.values()), 1)
    _assert_whole(run)


def test_a_signal_before_training_quits_at_once(runs: Runs) -> None:
    process = runs.start("early", "--nproc", "2", **LONG)
    end = time.monotonic() + 100
    while "loading" not in (runs.folder / "early.out").read_text() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    run = runs.end("early", process)
    assert run.code == 143, run.text
    assert not (run.folder / "run.json").exists()
    assert run.err.count("was stopped; nothing more was saved") == 1, run.err


def test_no_process_outlives_its_launcher(runs: Runs) -> None:
    keys = {**LONG, "auto_resume_from_checkpoints": True}
    whole = runs.several("whole, ddp", **keys)
    process = runs.start("orphans", "--nproc", "2", **keys)
    ranks = _until(process, runs.folder / "orphans", 6)
    process.kill()
    assert not _gone(list(ranks.values()), 60)
    run = runs.end("orphans", process)
    assert "Traceback" not in run.text
    assert run.json["status"] == "interrupted"  # it was told so, and has saved
    assert run.json["checkpoint"].endswith(f"checkpoint-{run.json['steps']}")
    _assert_whole(run)
    last = runs.end("orphans", runs.start("orphans", "--nproc", "2", **keys))
    assert last.code == 0, last.text
    assert difference(last.weights(), whole.weights()) == 0


# --- faults on one process -----------------------------------------------------------------------


def _with_fault(runs: Runs, name: str, code: str, **keys: Any) -> Run:
    path = runs.folder / f"{name}.yaml"
    asked = {"save_steps": 4, "eval_steps": None, "val_set_size": 0, **keys}
    path.write_text(yaml.safe_dump(runs.recipe(name, **asked)), encoding="utf-8")
    code_, text = launched_with(code, "train", str(path))
    return Run(runs.folder / name, code_, text, "")


def test_a_signal_to_one_process_while_the_result_is_saved(runs: Runs) -> None:
    code = """
from fusewright.train import finish
save = finish.save
def signalled(*given):
    if rank == 1:
        signal.raise_signal(signal.SIGTERM)
    save(*given)
finish.save = signalled
"""
    run = _with_fault(runs, "while saving", code)
    assert run.code == 143, run.text
    assert (run.json["status"], run.json["signal"]) == ("interrupted", 15)
    assert run.json["steps"] == 20
    assert run.weights()


def test_a_signal_to_all_while_rank_0_writes_the_last_files(runs: Runs) -> None:
    """The others have nothing left to do, and must not end it."""
    code = """
import time
from fusewright.train import finish
write = finish.write
def signalled(*given):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(2)
    write(*given)
finish.write = signalled
"""
    run = _with_fault(runs, "while writing", code)
    assert run.code == 0, run.text
    assert run.json["status"] == "finished"
    assert "another process" not in run.text
    assert run.text.count("Writing the last files") == 1


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_is_full_for_one_process(runs: Runs, which: int) -> None:
    code = f"""
from fusewright.train.trainer.engine import FineTuner
def full(trainer, folder):
    raise OSError(28, "No space left on device")
if rank == {which}:
    FineTuner._save_rng_state = full
"""
    run = _with_fault(runs, f"full for {which}", code)
    assert run.code == 1, run.text
    found = run.json
    assert (found["status"], found["reason"]) == ("disk full", "the disk is full")
    assert (found["steps"], found["checkpoint"]) == (4, None)
    assert run.out.count("The last checkpoint could not be written: the disk is full.") == 1
    assert not list(run.folder.glob(".*"))
    assert run.weights()


def test_a_loss_that_is_nan_on_one_process(runs: Runs) -> None:
    """The rows that are written are those of the process whose loss it is."""
    code = """
from fusewright.train.trainer.engine import FineTuner
compute_loss = FineTuner.compute_loss
def nan(trainer, model, inputs, *given, **named):
    if trainer.state.global_step == 5:
        print(f"rows of {rank}: {inputs['input_ids'][0].tolist()}", flush=True)
    loss = compute_loss(trainer, model, inputs, *given, **named)
    return loss * float("nan") if rank == 1 and trainer.state.global_step == 5 else loss
FineTuner.compute_loss = nan
"""
    run = _with_fault(runs, "nan", code)
    assert run.code == 1, run.text
    found = run.json
    assert (found["status"], found["steps"]) == ("nan", 5)
    assert found["reason"].startswith("step 6: the loss is nan; its rows are in")
    assert found["checkpoint"].endswith("checkpoint-5")
    saved = load_file(run.folder / "nan-batch-6.safetensors")["0.input_ids"][0].tolist()
    (own,) = re.findall(r"rows of 1: (\[.*\])", run.out)
    assert str(saved) == own
    assert "Traceback" not in run.out


def test_a_refusal_is_said_once(runs: Runs) -> None:
    """What all processes refuse, and what rank 0 alone can see."""
    process = runs.start("refused", "--nproc", "2", **LONG, ddp=False)
    run = runs.end("refused", process)
    assert run.code == 2
    assert run.err.count("\n") == 1, run.err
    assert "ddp: false means one process, but 2 processes run" in run.err
    (runs.folder / "taken").write_text("")
    process = runs.start("taken", "--nproc", "2", **LONG)
    run = runs.end("taken", process)
    assert run.code == 2
    assert run.err.count("\n") == 1, run.err
    assert run.err.startswith("fusewright: output_dir: ")
