"""Whole runs in several processes: what one process would have trained, and printed once.

By default only DDP is tried; ``pytest -m slow`` tries every strategy, and DeepSpeed's where it is
installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ..results import difference
from .runs import STRATEGIES, Run, Runs

slow = pytest.mark.slow
DEEPSPEED_THERE = importlib.util.find_spec("deepspeed") is not None
DEEPSPEED = pytest.mark.skipif(not DEEPSPEED_THERE, reason="deepspeed is not installed")
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
    assert run.curve("eval_loss")[-1][0] == one.json["steps"] >= 8
    norms = [(step, pytest.approx(value, rel=1e-3)) for step, value in one.curve("grad_norm")]
    assert run.curve("grad_norm") == norms
    found, expected = run.json, one.json
    for key in ("steps", "tokens", "trained_tokens", "data", "parameters", "status", "dtype"):
        assert found[key] == expected[key], key
    assert found["val_loss_before"] == pytest.approx(expected["val_loss_before"], rel=tolerance)
    assert found["val_loss_after"] == pytest.approx(expected["val_loss_after"], rel=tolerance)


def assert_said_once(run: Run) -> None:
    """What two processes print is what one would have printed."""
    announced = "importing PyTorch and transformers"
    assert run.err.splitlines() in ([announced], [announced] * 2)  # the launcher and rank 0
    # what DeepSpeed prints where there is no GPU
    lines = [line for line in run.out.splitlines() if line.strip() and "shm_comm_op" not in line]
    assert [line for line, times in Counter(lines).items() if times > 1] == []
    assert [line for line in lines if re.match(r"\[|W\d{4}|.*[Ww]arning", line)] == []


@pytest.mark.long
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
    assert found["ranks"][0]["rss_mb"] == pytest.approx(found["peak_rss_mb"], rel=0.01)
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


@pytest.mark.long("full")
@pytest.mark.parametrize("method", ["full", pytest.param("LoRA", marks=slow)])
def test_a_loss_that_weighs_tokens_is_the_same_in_two_processes(runs: Runs, method: str) -> None:
    """Gradients weigh tokens, not processes."""
    keys: dict[str, Any] = {"use_dft": True, **(FULL if method == "full" else {})}
    run = runs.forked(f"dft-{method}", **keys)
    one = runs.alone(**keys)
    assert_as_one(run, one)
    assert difference(run.weights(), one.weights()) < 1e-4


@slow
def test_copies_of_a_sharded_model(runs: Runs) -> None:
    """Two copies of the weights, each shared by two of four processes."""
    keys = {"save_steps": 4}
    run = runs.several("copies", 4, **keys, **STRATEGIES["fsdp"], dp_replicate_size=2)
    one = runs.alone(4, **keys)
    assert_as_one(run, one)
    assert_said_once(run)
    assert difference(run.weights(), one.weights()) < 1e-4
    assert len(run.json["ranks"]) == 4


QLORA = {"adapter": "qlora", "load_in_4bit": True}


@slow
@pytest.mark.parametrize("method", ["LoRA", "full", "QLoRA"])
@pytest.mark.parametrize("name", ["ddp", "fsdp", pytest.param("zero3", marks=DEEPSPEED)])
def test_an_optimized_model_is_the_same_on_each_rank(runs: Runs, name: str, method: str) -> None:
    more: dict[str, Any] = {"LoRA": {}, "full": FULL, "QLoRA": QLORA}[method]
    keys = {"optimize": True, "codegen": "eager", **more}
    run, one = (
        runs.several(f"optimized-{name}-{method}", **keys, **STRATEGIES[name]),
        runs.alone(**keys),
    )
    assert_as_one(run, one, 1e-4)
    expected = one.json["optimize"]["by_rule"]
    assert run.json["optimize"]["by_rule"] == expected
    assert expected["linear_cross_entropy"] == 1
    assert "has other rewrites than rank 0" not in run.out
    assert difference(run.weights(), one.weights()) < 1e-3


@slow
@pytest.mark.parametrize("method", ["LoRA", "full"])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_weights_are_rounded_in_each_process(runs: Runs, name: str, method: str) -> None:
    keys = {"export_format": "q8_0", **(FULL if method == "full" else {})}
    run = runs.several(f"rounded-{name}-{method}", **keys, **STRATEGIES[name])
    # a sum of gradients in another order may round a weight to the next value
    assert_as_one(run, runs.alone(**keys), 1e-3)
    assert "14 layers multiply by weights rounded to q8_0" in run.out


# --- resuming ------------------------------------------------------------------------------------

SAVING = {"save_steps": 8, "lr_scheduler": "cosine", "weight_decay": 0.1}


@slow
@pytest.mark.parametrize(
    ("method", "start", "others"),
    [
        ("LoRA", "alone", ["ddp", "fsdp"]),
        ("LoRA", "ddp", ["ddp", "alone"]),
        ("LoRA", "fsdp", ["fsdp", "alone", "ddp"]),
        ("full", "alone", ["fsdp"]),
        ("full", "fsdp", ["fsdp", "alone"]),
        pytest.param("LoRA", "alone", ["zero1", "zero3"], marks=DEEPSPEED),
        pytest.param("LoRA", "zero3", ["zero3", "fsdp", "alone"], marks=DEEPSPEED),
        pytest.param("full", "fsdp", ["zero3"], marks=DEEPSPEED),
        pytest.param("full", "zero1", ["zero1", "zero2", "alone"], marks=DEEPSPEED),
        pytest.param("full", "zero3", ["zero3", "alone"], marks=DEEPSPEED),
    ],
)
def test_any_strategy_resumes_what_any_other_has_saved(
    runs: Runs, method: str, start: str, others: list[str]
) -> None:
    keys = {**SAVING, **(FULL if method == "full" else {})}
    whole = first = runs.alone(**keys)
    if start != "alone":
        first = runs.several(f"saved by {start}, {method}", **keys, **STRATEGIES[start])
    keys["resume_from_checkpoint"] = str(first.folder / "checkpoint-8")
    for where in others:
        name = f"{start} to {where}, {method}"
        if where == "alone":
            run = runs.alone(**keys)
        else:
            run = runs.several(name, **keys, **STRATEGIES[where])
        assert run.json["resumed_from"] == 8, name
        assert_as_one(run, whole)
        print(
            name,
            difference(run.weights(), whole.weights()),
            difference(run.weights(), first.weights()),
        )
        if where == start:  # as if it had not been stopped
            assert difference(run.weights(), first.weights()) <= 2e-7, name


@slow
@pytest.mark.parametrize("name", ["fsdp", pytest.param("zero3", marks=DEEPSPEED)])
def test_a_sharded_run_whose_steps_are_done_is_resumed(runs: Runs, name: str) -> None:
    """As after a kill while the result is written: nothing is sharded any more."""
    keys = {**SAVING, **FULL}
    first = runs.several(f"done by {name}", **keys, **STRATEGIES[name])
    keys["resume_from_checkpoint"] = str(first.folder / f"checkpoint-{first.json['steps']}")
    run = runs.several(f"after {name}", **keys, **STRATEGIES[name])
    assert "all steps are done (more max_steps or num_epochs would" in run.out
    assert difference(run.weights(), first.weights()) == 0


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "full"])
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_in_16_bits(runs: Runs, stage: int, method: str) -> None:
    """Its dtype is that of the weights, whatever the Trainer's autocast is."""
    more: dict[str, Any] = {"LoRA": {}, "QLoRA": QLORA, "full": FULL}[method]
    keys = {"bf16": True, **more}
    run = runs.several(f"16 bits, {stage}, {method}", **keys, **STRATEGIES[f"zero{stage}"])
    one = runs.alone(**keys)
    assert run.json["val_loss_after"] == pytest.approx(one.json["val_loss_after"], rel=0.01)
    assert run.json["val_loss_after"] < run.json["val_loss_before"] - 0.05
    if method != "full":
        assert {t.dtype for t in run.weights().values()} == {torch.float32}


@DEEPSPEED
@pytest.mark.slow
def test_deepspeed_with_weights_of_two_dtypes(runs: Runs) -> None:
    """A head of 16 bits beside adapters of 32: refused before the first step, with what to do."""
    keys = {"bf16": True, "lora_modules_to_save": ["lm_head"], **STRATEGIES["zero3"]}
    refused = runs.end("two dtypes", runs.start("two dtypes", "--nproc", "2", **keys))
    assert refused.code == 2, refused.text
    assert "deepspeed: trains weights of one dtype, but these have" in refused.err
    run = runs.several("one dtype", peft_autocast_adapter_dtype=False, **keys)
    assert run.json["val_loss_after"] < run.json["val_loss_before"] - 0.05
