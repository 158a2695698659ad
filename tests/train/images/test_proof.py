"""Audits, comparisons and certificates of runs on rows with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fusewright.train import train
from fusewright.train.consent import Consent
from fusewright.train.export.command import export
from fusewright.train.export.options import ExportOptions, choose
from fusewright.train.inference.run_folder import open_run
from fusewright.train.proof import audit
from fusewright.train.recipe.load import load_recipe

from ..commands import fusewright
from .training import small, write_rows

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 12)


PACKED = {"sample_packing": True, "sequence_len": 256, "freeze_mm_modules": False,
          "optimize": True, "codegen": "eager"}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gemma3", {"micro_batch_size": 3}),
        pytest.param("qwen2_5_vl", PACKED, marks=pytest.mark.slow),
    ],
)
def test_audit(family: str, keys: dict[str, Any], written: Path, tmp_path: Path) -> None:
    """Of the recipe, of the run's own first step, and of what it has saved."""
    asked = small(family, written, tmp_path / "out", **keys)
    found = audit.of_recipe(load_recipe(asked), 256)
    assert found.passed, str(found)
    verdicts = {f.check: f.verdict for f in found.findings}
    assert verdicts["trained-tokens"] == verdicts["gradient-value"] == "pass"
    assert verdicts["packing"] == ("pass" if keys is PACKED else "skipped"), str(found)
    result = train({**asked, "audit": True}, console=QUIET)
    assert result.audit is not None
    assert result.audit["passed"], result.audit
    assert audit.of_run(tmp_path / "out", Consent(), 256).passed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_verify(family: str, written: Path, tmp_path: Path) -> None:
    asked = small(family, written, tmp_path / "out", codegen="eager", optimize=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked), encoding="utf-8")
    figures = tmp_path / "figures.json"
    done = fusewright("verify", path, "--steps", "2", "--json", figures)
    assert done.exit_code == 0, done.output
    verdicts = {w["name"]: w["verdict"] for w in json.loads(figures.read_text())["ways"]}
    expected = {
        "exact": "reference", "eager": "limit", "optimized": "passed", "merged": "passed",
        "packed": "passed", "1 x 2": "passed", "2 processes": "passed",
    }  # fmt: skip
    assert verdicts == expected


def test_a_certificate_says_what_it_leaves_out(written: Path, tmp_path: Path) -> None:
    train(small("llava", written, tmp_path / "out", val_set_size=6), console=QUIET)
    run = open_run(tmp_path / "out")
    done = export(run, choose(run, ExportOptions("merged", output=tmp_path / "x")), QUIET)
    assert done.certificate is not None
    assert done.certificate.passed, str(done.certificate)
    content = (tmp_path / "x" / "certificate.json").read_text(encoding="utf-8")
    assert "that have images: what towers compute is not judged" in content
