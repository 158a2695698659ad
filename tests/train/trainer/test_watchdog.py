"""Runs that go wrong by themselves: what is left of them, and what is said."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from fusewright.train import train
from fusewright.train.checkpoint.files import checkpoints
from fusewright.train.processes.signals import Interrupts
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.run import TrainingRun
from fusewright.train.trainer.engine import FlowCallback
from fusewright.train.trainer.watchdog import (
    LossWatchdog,
    NonFiniteGuard,
    NonFiniteStepError,
    watchdogs,
)

from ...load import stretched
from ..conftest import chat, make_model, make_tokenizer, write_rows

QUIET = Console(quiet=True)


@pytest.fixture
def poisoned(recipe: dict[str, Any], rows: Path, tmp_path: Path) -> dict[str, Any]:
    """A model for which the letter Z is no number; one row has it."""
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Z")] = torch.nan
    folder = tmp_path / "poisoned"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [chat(f"What is {i}?", f"It is the number {i}") for i in range(31)]
    lines.append(chat("What is Z?", "It is no number"))
    write_rows(rows, lines)
    # the one bad row comes at some later step
    return {
        **recipe,
        "base_model": str(folder),
        "sample_packing": False,
        "val_set_size": 0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 32,
        "curriculum_sampling": True,
    }


@pytest.mark.parametrize("adapter", [True, False])
def test_a_number_that_is_none(
    poisoned: dict[str, Any], rows: Path, tmp_path: Path, adapter: bool
) -> None:
    if not adapter:
        poisoned = {k: v for k, v in poisoned.items() if not k.startswith("lora")}
        poisoned |= {"adapter": None, "learning_rate": 1e-3}
    out = io.StringIO()
    result = train(poisoned, console=Console(file=out, width=200))
    assert (result.status, result.exit_code) == ("nan", 1)
    bad = result.steps + 1
    assert 1 < bad <= 16
    assert f"step {bad}: the loss is nan" in str(result.reason)
    assert f"Stopped at step {bad - 1} of 32" in out.getvalue()
    folder = tmp_path / "out"
    text = (folder / f"nan-batch-{bad}.txt").read_text(encoding="utf-8")
    assert "What is Z?" in text
    with safe_open(folder / f"nan-batch-{bad}.safetensors", "pt") as file:
        assert {"0.input_ids", "0.labels", "1.input_ids", "1.labels"} <= set(file.keys())
        assert "nan" in file.metadata()["losses"]
    # the weights are those of the same run with fewer steps
    train(poisoned, console=QUIET, output_dir=str(tmp_path / "before"), max_steps=bad - 1)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    saved, before = load_file(folder / name), load_file(tmp_path / "before" / name)
    for key in saved:  # where the model is no number, it stays so
        assert torch.allclose(saved[key], before[key], rtol=0, atol=0, equal_nan=True)
    assert result.checkpoint == str(folder / f"checkpoint-{bad - 1}")
    again = train(poisoned, console=QUIET, resume_from_checkpoint=True)
    assert (again.status, again.steps) == ("nan", bad - 1)
    assert json.loads((folder / "run.json").read_text())["status"] == "nan"


class Far(torch.Tensor):
    """A tensor that pretends to be on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_the_guard_lets_the_device_leave_out_a_step() -> None:
    """What happens on a GPU between two logged steps."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = NonFiniteGuard()

    def step(number: int, gradient: float, logged: bool) -> None:
        weight.grad = torch.full((3,), gradient)
        guard.add(number, {"input_ids": torch.tensor([[number]])}, torch.tensor(gradient))
        guard.judge(weight.grad.norm().as_subclass(Far), optimizer, logged)
        optimizer.step()

    step(1, 1.0, False)
    once = weight.detach().clone()
    step(2, float("nan"), False)
    assert torch.equal(weight, once)
    step(3, 1.0, False)
    assert not torch.equal(weight, once)
    assert torch.isfinite(weight).all()
    with pytest.raises(NonFiniteStepError, match="step 2: the loss is nan") as caught:
        step(4, 1.0, True)
    assert caught.value.batches[0]["input_ids"].item() == 2
    step(5, 1.0, True)
    assert "found_inf" not in vars(optimizer)


def test_a_step_that_the_device_left_out_at_the_end_is_noticed(
    poisoned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is logged after it, as on a GPU."""
    judge = NonFiniteGuard.judge

    def far(guard: NonFiniteGuard, norm: Any, optimizer: Any, logged: bool) -> Any:
        return judge(guard, norm.as_subclass(Far), optimizer, logged)

    first = train(poisoned, console=QUIET)
    monkeypatch.setattr(NonFiniteGuard, "judge", far)
    result = train(
        poisoned, console=QUIET, overwrite=True, logging_steps=100, logging_first_step=False,
        max_steps=first.steps + 2,
    )  # fmt: skip
    assert result.status == "nan"
    assert f"step {first.steps + 1}: the loss is nan" in str(result.reason)
    assert (tmp_path / "out" / f"nan-batch-{first.steps + 1}.txt").exists()


def test_the_loss_watchdog(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = io.StringIO()
    result = train(
        recipe,
        console=Console(file=out, width=200),
        loss_watchdog_threshold=0.01,
        loss_watchdog_patience=3,
        max_steps=9,
    )
    assert (result.status, result.steps, result.exit_code) == ("watchdog", 3, 1)
    assert "The loss stayed above loss_watchdog_threshold" in out.getvalue()
    assert result.checkpoint == str(tmp_path / "out" / "checkpoint-3")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    calm = train(recipe, console=QUIET, overwrite=True, loss_watchdog_threshold=100.0, max_steps=2)
    assert calm.status == "finished"


def test_the_watchdog_without_a_patience_of_its_own_waits_for_three(tmp_path: Path) -> None:
    (dog,) = watchdogs(Recipe(base_model="x", loss_watchdog_threshold=5.0))
    assert isinstance(dog, LossWatchdog)
    assert dog.patience == 3


def test_going_on_with_other_limits(recipe: dict[str, Any], tmp_path: Path) -> None:
    watched = {**recipe, "max_steps": 6, "save_steps": 1, "loss_watchdog_patience": 1}
    first = train({**watched, "loss_watchdog_threshold": 0.01}, console=QUIET)
    assert (first.status, first.steps) == ("watchdog", 1)
    changed = {**watched, "loss_watchdog_threshold": 100.0, "resume_from_checkpoint": True}
    assert train(changed, console=QUIET).status == "finished"


@pytest.mark.parametrize(("every", "steps", "epochs"), [(2, [2, 4], 0), (-1, [], 1), (0, [], 0)])
def test_when_garbage_is_collected(
    monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int], epochs: int
) -> None:
    collected: list[int] = []
    state = SimpleNamespace(global_step=0)
    monkeypatch.setattr("gc.collect", lambda: collected.append(state.global_step))
    flow = FlowCallback(MagicMock(), Recipe(base_model="x", gc_collect_steps=every), Interrupts())
    control = SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=False)
    for step in range(1, 5):
        state.global_step = step
        flow.on_step_end(None, state, control)
    assert collected == steps
    flow.on_epoch_end(None, state, control)
    assert collected[len(steps) :] == [4] * epochs


def test_a_signal_ends_the_loop_between_and_within_steps() -> None:
    interrupts = Interrupts()
    flow = FlowCallback(MagicMock(), Recipe(base_model="x"), interrupts)
    state = SimpleNamespace(global_step=1)
    for signalled in (None, signal.SIGTERM):
        interrupts.signal = signalled
        for event in (flow.on_substep_end, flow.on_step_end, flow.on_evaluate):
            control = SimpleNamespace(should_training_stop=False, should_save=False)
            event(None, state, control)
            assert control.should_training_stop == (signalled is not None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
def test_a_full_disk(recipe: dict[str, Any], small_disk: Path) -> None:
    out = io.StringIO()
    folder = small_disk / "out"
    result = train(
        recipe, console=Console(file=out, width=200), output_dir=str(folder), save_steps=1,
        max_steps=50,
    )  # fmt: skip
    assert (result.status, result.exit_code) == ("disk full", 1)
    assert 1 < result.steps < 50
    there = checkpoints(folder)
    assert result.checkpoint == str(there[-1])
    assert f"checkpoint-{result.steps - 1}" == there[-1].name
    for path in there:
        assert load_file(path / "adapter_model.safetensors")
        assert torch.load(path / "optimizer.pt")["state"]
    assert not list(folder.glob(".*"))
    said = out.getvalue()
    assert "The last checkpoint could not be written: the disk is full." in said
    assert f"{there[-1]} is complete" in said
    assert "Traceback" not in said
    # with room again, it goes on
    subprocess.run(["mount", "-o", "remount,size=50M", str(small_disk)], check=True)
    more = train(
        recipe, console=QUIET, output_dir=str(folder), save_steps=1, max_steps=50,
        resume_from_checkpoint=True, save_total_limit=2,
    )  # fmt: skip
    assert (more.status, more.resumed_from) == ("finished", result.steps - 1)


@pytest.mark.long
def test_files_that_may_not_grow(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The same where the system limits the size of a file, through the command."""
    asked = tmp_path / "recipe.yaml"
    asked.write_text(yaml.safe_dump({**recipe, "save_steps": 1, "lora_r": 32}), encoding="utf-8")
    code = (
        "import resource, signal, sys; from fusewright.cli.main import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        f"sys.argv = ['fusewright', 'train', {str(asked)!r}]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        timeout=stretched(300), check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be written: the disk is full" in done.stdout
    assert "saved checkpoint" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize(
    "broken",
    [
        "checkpoint.save_model.plot", "checkpoint.save_model.check_adapter",
        "inference.generate.answer", "report.page.write", "report.model_card.write",
    ],
)  # fmt: skip
def test_what_fails_after_training_costs_nothing(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if broken.endswith("answer") and run.result.sample is None:
            return "before"
        raise OSError(errno.EIO, "the printer is on fire")

    monkeypatch.setattr(f"fusewright.train.{broken}", fail)
    out = io.StringIO()
    run = TrainingRun(
        Recipe.model_validate({**recipe, "sample_prompt": "What is 3?"}),
        Console(file=out, width=200),
    )
    result = run.run()
    assert (result.status, result.exit_code) == ("finished", 0)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "the printer is on fire" in out.getvalue()
    assert [p["error"] for p in result.problems] == ["OSError: [Errno 5] the printer is on fire"]
    kept = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert kept["problems"] == result.problems
