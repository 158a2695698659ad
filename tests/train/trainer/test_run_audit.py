"""Runs of ours are audited: nothing that is trained changes, and what is wrong is said."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from fusewright.train import train
from fusewright.train.consent import Consent
from fusewright.train.proof.audit import of_run
from fusewright.train.trainer import engine

from ..results import assert_same, curves

QUIET = Console(quiet=True)


@pytest.mark.long
def test_an_audited_run_is_the_same_and_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {
        "lora_dropout": 0.2, "gradient_accumulation_steps": 2, "warmup_steps": 2, "save_steps": 2,
        "lr_scheduler": "cosine", "micro_batch_size": 1,
    }  # fmt: skip
    plain = train(recipe, console=QUIET, output_dir=str(tmp_path / "plain"))
    assert plain.audit is None
    audited = train(recipe, console=QUIET, audit=True, output_dir=str(tmp_path / "audited"))
    start = str(tmp_path / "plain" / "checkpoint-2")
    resumed = train(
        recipe, console=QUIET, audit=True, output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=start,
    )  # fmt: skip
    for run in (audited, resumed):
        assert_same(tmp_path / "plain", run.output_dir)
        assert curves(run) == curves(plain)
        assert run.audit is not None
        assert run.seconds["audit"] > 0
        assert run.audit["passed"], run.audit
        verdicts = {f["check"]: f["verdict"] for f in run.audit["findings"]}
        for check in ("accumulation-scale", "loss-scale", "warmup", "weights-moved", "dropout",
                      "trainable-set", "end-of-turn"):  # fmt: skip
            assert verdicts[check] == "pass", run.audit


@pytest.mark.long
def test_a_finished_run_is_audited_by_its_folder(recipe: dict[str, Any]) -> None:
    folder = train({**recipe, "max_steps": 2}, console=QUIET).output_dir
    found = of_run(folder, Consent(), tokens=64)
    assert found.passed, found
    answers = {f.check: f.verdict for f in found.findings}
    assert (
        answers["adapter-reach"] == answers["trainable-set"] == answers["gradient-value"] == "pass"
    )


@pytest.mark.long
def test_a_run_that_fails_its_audit_says_so_and_ends_as_it_would(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine, "custom_schedule", lambda recipe, optimizer, *_: LambdaLR(optimizer, lambda _: 1.0)
    )
    recipe |= {"audit": True, "lr_scheduler": "linear", "warmup_steps": 3}
    console = Console(file=StringIO(), width=200)
    result = train(recipe, console=console)
    assert result.exit_code == 0
    found = json.loads((result.output_dir / "run.json").read_text())["audit"]
    assert [f["check"] for f in found["findings"] if f["verdict"] == "fail"] == ["warmup"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "audit: 1 failed" in said
    assert "there is no warmup" in said
    assert "1 failed" in (result.output_dir / "README.md").read_text()
