"""Methods in two processes: what one process would have trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ..processes.runs import STRATEGIES, Runs
from ..results import difference
from .recipes import method_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("methods"))


@pytest.mark.long("dpo-ddp")
@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("dpo", "ddp"),
        *(pytest.param("dpo", s, marks=pytest.mark.slow) for s in ("fsdp", "zero2")),
        *(pytest.param(m, "ddp", marks=pytest.mark.slow) for m in ("ipo", "orpo", "cpo", "reward")),
    ],
)  # fmt: skip
def test_two_processes_train_what_one_does(method: str, strategy: str, runs: Runs) -> None:
    """The 17 batches of an epoch do not go round, nor do the 3 to validate on."""
    if strategy == "zero2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    keys = method_recipe(method, runs.base, runs.folder)
    for name in ("output_dir", "max_steps", "gradient_accumulation_steps"):
        del keys[name]
    keys |= {"num_epochs": 2, "sample_packing": None, "logging_steps": 1, "eval_steps": 5}
    run = runs.forked(f"{method}-{strategy}", **keys, **STRATEGIES[strategy])
    one = runs.alone(**keys)
    for key in ("loss", "eval_loss", "learning_rate"):
        assert run.curve(key) == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in one.curve(key)
        ], key
    assert difference(run.weights(), one.weights()) < 1e-5
    assert run.json["steps"] == one.json["steps"] == 18
    assert run.json["tokens"] == one.json["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_a_reference_that_is_sharded_is_the_model_at_first(strategy: str, runs: Runs) -> None:
    """All weights are trained, beside a second copy of them: at first, the loss is ln 2."""
    if strategy != "fsdp":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    full = {"adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-4}
    keys = method_recipe("dpo", runs.base, runs.folder, **full)
    for name in ("output_dir", "gradient_accumulation_steps"):
        del keys[name]
    keys |= {"max_steps": 2, "sample_packing": None}
    run = runs.several(f"full-{strategy}", **keys, **STRATEGIES[strategy])
    assert run.curve("eval_loss")[0] == (0, pytest.approx(math.log(2), rel=1e-6))
    assert run.json["val_loss_after"] != run.json["val_loss_before"]
