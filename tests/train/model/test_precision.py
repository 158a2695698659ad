"""Weights in bfloat16 only where the machine computes in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fusewright.train import train
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge.merge import MergeOptions, merge
from fusewright.train.model import precision
from fusewright.train.model.precision import dtype_for_training, has_bfloat16, precision_warning

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a CPU can do")


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)


def test_what_is_asked_for_is_taken() -> None:
    assert dtype_for_training("bfloat16") is torch.bfloat16
    assert dtype_for_training("float32") is torch.float32


@ON_CPU
@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool
) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    has_bfloat16.cache_clear()
    try:
        expected = torch.bfloat16 if avx512 or amx else torch.float32
        assert dtype_for_training("auto") is expected
    finally:
        has_bfloat16.cache_clear()


@ON_CPU
@pytest.mark.parametrize("has", [False, True])
def test_a_cpu_of_another_kind_is_asked(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert has_bfloat16.__wrapped__() is has


@pytest.mark.usefixtures("no_bfloat16")
def test_an_imitated_precision_is_told_and_kept(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train({**recipe, "bf16": True, "max_steps": 1}, console=Console(width=200))
    said = " ".join(capsys.readouterr().out.split())
    assert "no instructions for bfloat16" in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("no_bfloat16")
def test_nothing_is_told_where_nothing_is_imitated() -> None:
    assert precision_warning("auto") is None
    assert precision_warning("float32") is None
    assert precision_warning("bfloat16") is not None


def test_merged_weights_have_the_dtype_of_the_run_wherever_they_are_merged(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    quiet = Console(quiet=True)
    train({**recipe, "bf16": "auto", "max_steps": 1}, console=quiet)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    folder = merge(open_run(tmp_path / "out"), MergeOptions(), quiet)
    (file,) = folder.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
