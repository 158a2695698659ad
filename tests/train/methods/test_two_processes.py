"""Methods in two processes: what one process would have trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..processes.runs import Runs, difference
from .recipes import method_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_two_processes_train_what_one_does(method: str, runs: Runs) -> None:
    """The 17 batches of an epoch do not go round, nor do the 3 to validate on."""
    keys = method_recipe(method, runs.base, runs.folder)
    for name in ("output_dir", "max_steps", "gradient_accumulation_steps"):
        del keys[name]
    keys |= {"num_epochs": 2, "sample_packing": None, "logging_steps": 1, "eval_steps": 5}
    run = runs.several(f"{method}-2", **keys)
    one = runs.alone(**keys)
    for key in ("loss", "eval_loss", "learning_rate"):
        assert run.curve(key) == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in one.curve(key)
        ], key
    assert difference(run.weights(), one.weights()) < 1e-5
    assert run.json["steps"] == one.json["steps"] == 18
    assert run.json["tokens"] == one.json["tokens"]
