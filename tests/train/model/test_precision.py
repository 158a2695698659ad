"""Weights in bfloat16 only where the machine computes in it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.kernels.processor import KINDS
from fusewright.train import preflight, train
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import MergeOptions, merge
from fusewright.train.model import precision
from fusewright.train.model.load import load_model
from fusewright.train.model.precision import dtype_for_training, precision_warning
from fusewright.train.model.quantize import quantization
from fusewright.train.plan import plan
from fusewright.train.plan.cards import parse_devices
from fusewright.train.recipe.load import load_recipe
from tests.explained import explain

from ..conftest import checked, make_model

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a CPU can do")


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)


def test_what_is_asked_for_is_taken() -> None:
    assert dtype_for_training("bfloat16") is torch.bfloat16
    assert dtype_for_training("float32") is torch.float32


@ON_CPU
@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    kind: str, choose_for: Callable[[str], None]
) -> None:
    choose_for(kind)
    expected = torch.float32 if kind in ("avx2", "avx512") else torch.bfloat16
    assert dtype_for_training("auto") is expected


@pytest.fixture(params=[False, True], ids=["T4", "L4"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A GPU, as PyTorch describes it; whether it has instructions for bfloat16, which T4s have not.

    PyTorch imitates them there, and says that they are supported if it is not asked twice.
    """
    has: bool = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation
    )
    return has


def test_auto_is_float16_on_a_gpu_without_bfloat16(gpu: bool) -> None:
    recipe = checked("x", bf16="auto", adapter="qlora", load_in_4bit=True)
    expected = torch.bfloat16 if gpu else torch.float16
    assert dtype_for_training(recipe.precision()) is expected
    assert dtype_for_training("auto", adapters=False) is (torch.bfloat16 if gpu else torch.float32)
    assert precision.computes_in(recipe.precision()) == str(expected).removeprefix("torch.")
    config = quantization(recipe, dtype_for_training(recipe.precision()))
    assert config.bnb_4bit_compute_dtype is expected
    assert dtype_for_training("bfloat16") is torch.bfloat16  # imitated, and said so
    assert (precision_warning("bfloat16") is None) == gpu


def test_layers_are_not_divided_where_losses_are_scaled(gpu: bool) -> None:
    recipe = checked("x", bf16="auto", tensor_parallel_size=2)
    said = [line for line in preflight._precision(recipe) if "tensor_parallel_size" in line]
    assert len(said) == (0 if gpu else 1)


@pytest.mark.parametrize(("card", "adapters", "expected"), [
    ("T4", True, torch.float16), ("T4", False, torch.float32), ("V100", True, torch.float16),
    ("L4", True, torch.bfloat16), ("8GB", True, torch.bfloat16),
])  # fmt: skip
def test_a_plan_for_another_card_takes_its_precision(
    card: str, adapters: bool, expected: torch.dtype
) -> None:
    recipe = checked("x", bf16="auto", **({"adapter": "lora"} if adapters else {}))
    assert plan._dtype(recipe, parse_devices(card).card) is expected


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
    found = []
    changes = (lambda m: m.double(), lambda m: m, lambda m: optimize(m, codegen="eager"))
    for change in changes:
        model = change(load_model(load_recipe({**keys, "fp32_norms": True})))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), model.model.norm.weight.grad))
    assert [gradient.dtype for _, gradient in found[1:]] == [torch.float32] * 2
    for exact, eager, ours in zip(*found, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        budget = 1.5 * (eager - exact).abs().max() + rounding
        assert (ours - exact).abs().max() <= budget


def test_norms_in_float32_leave_the_rewrites(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "bf16": True}
    ids = torch.arange(3, 23)[None].repeat(2, 1)
    reports = []
    for wanted in (False, True):
        model = load_model(load_recipe({**keys, "fp32_norms": wanted}))
        optimize(model, codegen="eager")
        model(input_ids=ids, labels=ids).loss.backward()
        reports.append(explain(model))
    assert reports[0].by_rule() == reports[1].by_rule()


@pytest.mark.parametrize("codegen", [None, "eager"])
def test_norms_in_float32_follow_the_model_to_another_dtype(tmp_path: Path, codegen: Any) -> None:
    """``fusewright verify`` widens the whole model for its reference."""
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "bf16": True}
    ids = torch.arange(3, 23)[None].repeat(2, 1)
    losses = []
    for wanted in (False, True):
        model: Any = load_model(load_recipe({**keys, "fp32_norms": wanted})).to(torch.float32)
        if codegen is not None:
            optimize(model, codegen=codegen)
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
        assert model.model.norm(torch.ones(1, 1, 32)).dtype == torch.float32
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("optimized", [False, True])
def test_copies_have_norms_in_float32(tmp_path: Path, optimized: bool) -> None:
    make_model().save_pretrained(tmp_path / "base")
    keys = {"base_model": str(tmp_path / "base"), "datasets": [{"path": "a/b"}], "bf16": True}
    plain = load_model(load_recipe(keys))
    model: Any = load_model(load_recipe({**keys, "fp32_norms": True}))
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.arange(3, 23)[None].repeat(2, 1)
    if optimized:
        optimize(model, codegen="eager")
    expected = model(input_ids=ids, labels=ids).loss
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copy.model.norm, type(plain.model.norm))
        with torch.no_grad():
            model.model.norm.weight.mul_(2)  # the copies have weights of their own
        loss = copy(input_ids=ids, labels=ids).loss
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
        loss.backward()
        assert copy.model.norm.weight.grad.dtype == torch.float32
        with torch.no_grad():
            model.model.norm.weight.div_(2)
    model.save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    assert {n for n, t in load_file(file).items() if t.dtype == torch.float32} == {
        n for n in plain.state_dict() if "norm" in n
    }


def test_norms_that_are_not_there_or_cannot_be_had(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "fp32_norms": True}
    chosen = load_recipe({**keys, "fp32_norm_classes": ["transformers.nowhere.RMSNorm"]})
    with pytest.raises(RecipeError, match=r"has no transformers\.nowhere\.RMSNorm"):
        load_model(chosen)
    with pytest.raises(RecipeError, match="fp32_norms: not with fsdp_config"):
        load_recipe({**keys, "fsdp_config": {"version": 2}})
