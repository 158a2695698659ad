"""Whole runs in several processes: what one process would have trained, and printed once.

By default only DDP is tried; ``pytest -m slow`` tries every strategy, and DeepSpeed's where it is
installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from .runs import STRATEGIES, Run, Runs, difference

slow = pytest.mark.slow
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
FULL = {"adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"))


def assert_as_one(run: Run, one: Run, tolerance: float = 1e-5) -> None:
    """Every figure of the training is that of one process."""
    for key in ("loss", "eval_loss", "learning_rate"):
        assert run.curve(key) == [
            (step, pytest.approx(value, rel=tolerance)) for step, value in one.curve(key)
        ], key
    assert run.curve("eval_loss")[-1][0] == 16
    norms = [(step, pytest.approx(value, rel=1e-3)) for step, value in one.curve("grad_norm")]
    assert run.curve("grad_norm") == norms
    found, expected = run.json, one.json
    for key in ("steps", "tokens", "trained_tokens", "data", "parameters", "status", "dtype"):
        assert found[key] == expected[key], key
    assert found["val_loss_before"] == pytest.approx(expected["val_loss_before"], rel=tolerance)
    assert found["val_loss_after"] == pytest.approx(expected["val_loss_after"], rel=tolerance)


def assert_said_once(run: Run) -> None:
    """What two processes print is what one would have printed."""
    assert run.err == ""
    lines = [line for line in run.out.splitlines() if line.strip()]
    assert [line for line, times in Counter(lines).items() if times > 1] == []
    assert [line for line in lines if re.match(r"\[|W\d{4}|.*[Ww]arning", line)] == []


def test_two_processes_train_what_one_does(runs: Runs) -> None:
    """The 15 batches of an epoch do not go round, nor do the 5 to validate on."""
    keys = {"sample_prompt": "What is 3?", "sample_max_tokens": 4, "save_steps": 8}
    run, one = runs.several("ddp", **keys), runs.alone(**keys)
    assert_as_one(run, one)
    assert_said_once(run)
    assert difference(run.weights(), one.weights()) < 1e-5
    for line in (
        "processes: 2; each has all the weights (DDP)", "training for 16 steps",
        "  step 16: saved checkpoint-16",
    ):  # fmt: skip
        assert run.out.splitlines().count(line) == 1, line
    assert "memory by rank" in run.out
    found = run.json
    assert [set(rank) for rank in found["ranks"]] == [{"rss_mb"}] * 2
    assert all(rank["rss_mb"] > 100 for rank in found["ranks"])
    assert one.json["ranks"] == []
    assert found["adapter_check"]["exact"]
    assert found["sample"] == one.json["sample"]
    assert [str(p.relative_to(run.folder)) for p in run.folder.rglob("run.json")] == ["run.json"]
    names = {p.name for p in (run.folder / "checkpoint-16").iterdir()}
    expected = {p.name for p in (one.folder / "checkpoint-16").iterdir()}
    assert names == expected - {"rng_state.pth"} | {"rng_state_0.pth", "rng_state_1.pth"}
    assert not list(run.folder.glob(".*"))


# --- every strategy ------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("method", ["LoRA", "full"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=DEEPSPEED if "zero" in n else ()) for n in STRATEGIES]
)
def test_a_strategy_trains_what_one_process_does(runs: Runs, name: str, method: str) -> None:
    keys = {"save_steps": 8, **(FULL if method == "full" else {})}
    run = runs.several(f"{name}-{method}", **keys, **STRATEGIES[name])
    one = runs.alone(**keys)
    assert_as_one(run, one)
    assert_said_once(run)
    assert difference(run.weights(), one.weights()) < 1e-4
