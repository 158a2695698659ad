"""Whole runs of each method: what they learn, report and save, and how they resume."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fusewright.errors import RecipeError
from fusewright.train import train

from ..commands import fusewright
from .recipes import METHODS, MODELS, PAIRED, method_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

QUIET = Console(quiet=True)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.long("kto", "ipo")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_reports(method: str, base: Path, tmp_path: Path) -> None:
    keys = {"eval_steps": 6, "max_steps": 12}
    result = train(method_recipe(method, base, tmp_path, **keys), console=QUIET)
    assert result.status == "finished"
    assert result.val_loss_after < result.val_loss_before
    steps = [entry for entry in result.history if "loss" in entry]
    assert len(steps) == 12
    assert steps[-1]["loss"] < steps[0]["loss"]
    if method in ("dpo", "ipo", "kto"):  # else a margin is mostly that of the answers' lengths
        assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    validations = [entry for entry in result.history if "eval_rewards/margins" in entry]
    assert [entry["step"] for entry in validations] == [0, 6, 12]
    assert not any("eval_rewards/margins" in entry for entry in steps)
    assert result.adapter_check["exact"]
    assert sorted(p.name for p in (tmp_path / "out").glob("adapter*")) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    written = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert written["data"]["train_sequences"] == 34


@pytest.mark.long("process_reward-True", "reward-True")
@pytest.mark.parametrize("optimize", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", MODELS)
def test_a_model_of_rewards(
    method: str, optimize: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = {"eval_steps": 4, "max_steps": 8, "optimize": optimize}
    result = train(method_recipe(method, base, tmp_path, **keys), console=QUIET)
    assert result.status == "finished"
    assert result.val_loss_after < result.val_loss_before
    last = result.history[-1]
    assert last["eval_accuracy"] > 0.5
    names = adapter(tmp_path / "out")
    assert any("score" in name for name in names)
    assert result.adapter_check["exact"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "fusewright eval ." in card
    assert "fusewright chat" not in card
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    found = capsys.readouterr().out
    assert re.match(r"tensor\(\[\[\S+\]\]\)" if method == "reward" else r"tensor\(\[\[\[", found)


@pytest.mark.long("kto", "ipo", "cpo", "orpo", "simpo", "process_reward")
@pytest.mark.parametrize("method", [*METHODS, *MODELS])
def test_a_run_that_resumes_ends_with_the_same_weights(
    method: str, base: Path, tmp_path: Path
) -> None:
    """Also the figures that were measured before the checkpoint and logged after it."""
    keys = {"save_steps": 3, "eval_steps": 3, "max_steps": 6, "logging_steps": 2}
    whole = train(
        method_recipe(method, base, tmp_path, output_dir=str(tmp_path / "whole"), **keys),
        console=QUIET,
    )
    rest = train(
        method_recipe(method, base, tmp_path, output_dir=str(tmp_path / "rest"), **keys),
        console=QUIET, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
    )  # fmt: skip
    one, other = adapter(tmp_path / "whole"), adapter(tmp_path / "rest")
    assert all(torch.equal(one[name], other[name]) for name in one)
    same = ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins", "num_tokens")
    for entry, again in zip(whole.history, rest.history, strict=True):
        assert {k: entry[k] for k in same if k in entry} == {
            k: again[k] for k in same if k in again
        }


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_whole_model_beside_a_reference(method: str, base: Path, tmp_path: Path) -> None:
    full = {"adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3}
    beside = train(method_recipe(method, base, tmp_path, **full), console=QUIET)
    before = train(
        method_recipe(method, base, tmp_path, **full, precompute_ref_log_probs=True),
        console=QUIET, overwrite=True,
    )  # fmt: skip
    assert beside.history[0]["eval_loss"] == before.history[0]["eval_loss"]
    if method == "dpo":  # KTO's pairs of prompts and other answers are not the same
        for one, other in zip(beside.history, before.history, strict=True):
            assert ("loss" in one) == ("loss" in other)
            assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-5)
    losses = [entry["loss"] for entry in beside.history if "loss" in entry]
    assert len(set(losses)) == len(losses)


def test_an_adapter_to_begin_with_is_the_reference(base: Path, tmp_path: Path) -> None:
    first = train(method_recipe("dpo", base, tmp_path), console=QUIET)
    keys = {"lora_model_dir": str(first.output_dir), "output_dir": str(tmp_path / "second")}
    second = train(method_recipe("dpo", base, tmp_path, **keys), console=QUIET)
    assert second.val_loss_before == pytest.approx(0.6931, abs=1e-3)  # both are the same at first
    assert abs(first.val_loss_after - 0.6931) > 1e-2  # it has learnt something
    names = sorted(str(p.relative_to(tmp_path / "second")) for p in
                   (tmp_path / "second").rglob("adapter_model*"))  # fmt: skip
    assert names == ["adapter_model.safetensors"]


@pytest.mark.long("dpo-bfloat16", "orpo-float32")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("dpo", "bfloat16"), ("orpo", "float32"),
        *(
            pytest.param(m, d, marks=pytest.mark.slow)
            for m in METHODS for d in ("float32", "bfloat16")
            if (m, d) not in (("dpo", "bfloat16"), ("orpo", "float32"))
        ),
    ],
)  # fmt: skip
def test_an_optimized_run_learns_the_same(
    method: str, dtype: str, base: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"bf16": dtype == "bfloat16", "learning_rate": 1e-3}
    plain = train(method_recipe(method, base, tmp_path, **keys), console=QUIET)
    fast = train(
        method_recipe(method, base, tmp_path, **keys, optimize=True), console=QUIET, overwrite=True
    )
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for one, other in zip(plain.history, fast.history, strict=True):
        for name in {"loss", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=tolerance), name
    assert fast.optimize["sites"]
    assert fast.optimize["logits"].startswith("in tiles: ")
    assert not [b for b in fast.optimize["bypasses"] if "real tensor" in str(b)]


@pytest.mark.long
def test_a_step_that_is_tried_again_is_measured_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train.methods.table import Dpo

    keys = {"optimize": True, "memory": "auto", "max_steps": 1, "val_set_size": 0}
    whole = train(method_recipe("dpo", base, tmp_path, **keys), console=QUIET)
    own, tries = Dpo.compute_loss, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = own(self, *args, **kwargs)
        tries.append(loss)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no memory")
        return loss

    monkeypatch.setattr(Dpo, "compute_loss", failing)
    again = train(method_recipe("dpo", base, tmp_path, **keys), console=QUIET, overwrite=True)
    (one,), (other,) = ([e for e in r.history if "loss" in e] for r in (whole, again))
    assert len(tries) > 1
    for name in ("loss", "num_tokens", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert one[name] == pytest.approx(other[name], rel=1e-5), name


@pytest.mark.parametrize("method", PAIRED)
def test_the_figure_that_judges(method: str, base: Path, tmp_path: Path) -> None:
    keys = {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    recipe = method_recipe(method, base, tmp_path, **keys)
    train(recipe, console=QUIET, metric_for_best_model="rewards/margins")
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    margins = {e["step"]: e["eval_rewards/margins"] for e in state["log_history"]
               if "eval_rewards/margins" in e and e["step"]}  # fmt: skip
    assert state["best_metric"] == max(margins.values())
    assert state["best_global_step"] == max(margins, key=lambda step: margins[step])
    with pytest.raises(RecipeError, match="metric_for_best_model: validation has no accuracy"):
        train(recipe, console=QUIET, overwrite=True, metric_for_best_model="accuracy")


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("dpo", {}), ("dpo", {"precompute_ref_log_probs": True}),
        ("kto", {"precompute_ref_log_probs": True}), ("orpo", {}), ("reward", {}),
        ("process_reward", {}),
    ],
)  # fmt: skip
def test_a_finished_run_is_evaluated_as_it_was_validated(
    method: str, keys: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    result = train(method_recipe(method, base, tmp_path, **keys), console=QUIET)
    assert fusewright("eval", tmp_path / "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert found["loss"] == pytest.approx(result.val_loss_after, rel=1e-5)
    last = result.history[-1]
    figures = found["results"]["validation"]["figures"]
    for name in ("rewards/margins", "accuracy"):
        if f"eval_{name}" in last:
            assert figures[name] == pytest.approx(last[f"eval_{name}"], rel=1e-4), name


def test_validations_have_all_figures_without_steps_between(base: Path, tmp_path: Path) -> None:
    train(method_recipe("dpo", base, tmp_path), console=QUIET)
    history = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["history"]
    found = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [0, 4]
    for name in ("rewards/accuracies", "rewards/chosen", "rewards/margins", "logps/rejected"):
        assert all(f"eval_{name}" in entry for entry in found), name
    assert not any("eval_num_tokens" in entry for entry in history)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("Accuracy", "Rewards of answers", "Log-probabilities of answers",
                  "rejected, validation"):  # fmt: skip
        assert words in page, words


def test_the_figure_that_judges_is_told_and_so_is_the_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train.methods.table import Dpo

    was = Dpo.figures

    def best_at_two(self: Any) -> dict[str, float]:
        step = self.state.global_step
        return {**was(self), "eval_rewards/accuracies": {0: 0.25, 2: 0.875}.get(step, 0.5)}

    monkeypatch.setattr(Dpo, "figures", best_at_two)
    keys = {
        "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/accuracies",
    }  # fmt: skip
    text = io.StringIO()
    recipe = method_recipe("dpo", base, tmp_path, **keys)
    result = train(recipe, console=Console(file=text, width=1000))
    said = text.getvalue()
    assert "validation rewards/accuracies before: 0.250" in said
    assert "step 2: validation rewards/accuracies 0.875" in said
    assert "step 4: validation rewards/accuracies 0.500 (-0.375)" in said
    assert "\nthe best checkpoint, of step 2, was loaded" in said
    assert "4 of 4; the best checkpoint, of step 2, was loaded" in said
    assert result.best_step == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the weights are those of step 2, the best checkpoint" in page


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    from fusewright.train.methods.reference import read_reference, write_reference

    write_reference(torch.nn.Linear(3, 2), tmp_path)
    read_reference(torch.nn.Linear(3, 2), tmp_path)
    with pytest.raises(RecipeError, match="the weights of another model"):
        read_reference(torch.nn.Linear(3, 2, bias=False), tmp_path)


@pytest.mark.parametrize(
    ("keys", "alike"),
    [
        *(({"rl": method}, True) for method in ("dpo", "ipo", "kto")),
        *(({"rl": method}, False) for method in ("orpo", "simpo")), ({}, False),
    ],
)  # fmt: skip
def test_models_that_are_compared_are_compiled_alike(
    keys: dict[str, Any], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.compiler import pipeline
    from fusewright.train.recipe.recipe import Recipe
    from fusewright.train.trainer.ready import optimize_model

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(pipeline, "optimize", lambda model, **options: given.append(options))
    rows = [{"path": "rows.jsonl", "type": "chat_template"}]
    optimize_model(None, Recipe.model_validate({"base_model": "m", "datasets": rows, **keys}))
    assert [options["compile_no_grad"] for options in given] == [alike]


def test_trl_that_is_not_installed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missed before anything imports it."""

    def version(name: str) -> str:
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return of_package(name)

    of_package = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in list(sys.modules):
        if re.match(r"trl\b|fusewright\.train\.methods\.(?!task)", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RecipeError, match=r"rl: dpo needs the package trl, which is not installed"):
        train(method_recipe("dpo", base, tmp_path), console=QUIET)
