"""Weights in bfloat16 only where the machine computes in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge.merge import MergeOptions, merge
from fusewright.train.model import precision
from fusewright.train.model.load import load_model
from fusewright.train.model.precision import dtype_for_training, has_bfloat16, precision_warning
from fusewright.train.recipe.load import load_recipe

from ..conftest import make_model

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


def test_norms_in_float32_among_weights_of_16_bits(tmp_path: Path) -> None:
    """What they compute is that of float32, and small updates of their weights are not lost."""
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "bf16": True}
    models = [load_model(load_recipe({**keys, "fp32_norms": wanted})) for wanted in (True, False)]
    wide, narrow = models
    norms = {n for n, _ in wide.named_parameters() if "norm" in n}
    assert len(norms) == 5
    for name, parameter in wide.named_parameters():
        assert (parameter.dtype == torch.float32) == (name in norms), name
    norm = wide.model.norm
    values = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    exact = narrow.model.norm.double()(values.double())
    torch.testing.assert_close(norm(values), exact.to(torch.bfloat16), rtol=0, atol=0)
    assert norm(values).dtype == torch.bfloat16
    narrow.model.norm.bfloat16()
    ids = torch.arange(3, 23)[None]
    moved = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        before = model.model.norm.weight.detach().clone()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        moved.append(bool((model.model.norm.weight != before).any()))
    assert moved == [True, False]


def test_norms_in_float32_under_the_compiler(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "bf16": True}
    ids = torch.arange(3, 23)[None].repeat(2, 1)
    losses = []
    for change in (lambda m: m, lambda m: optimize(m, codegen="eager")):
        model = change(load_model(load_recipe({**keys, "fp32_norms": True})))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert model.model.norm.weight.grad.dtype == torch.float32
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_norms_that_are_not_there_or_cannot_be_had(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "fp32_norms": True}
    chosen = load_recipe({**keys, "fp32_norm_classes": ["transformers.nowhere.RMSNorm"]})
    with pytest.raises(RecipeError, match=r"has no transformers\.nowhere\.RMSNorm"):
        load_model(chosen)
    with pytest.raises(RecipeError, match="fp32_norms: not with fsdp_config"):
        load_recipe({**keys, "fsdp_config": {"version": 2}})
