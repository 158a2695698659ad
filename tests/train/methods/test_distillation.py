"""Distillation: the loss against a plain formula, and whole runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.data.teacher import IDS, LOGPROBS
from fusewright.train.methods.distillation import Distillation, DistillationTask
from fusewright.train.recipe.load import load_recipe

from ..commands import fusewright, refused
from ..conftest import make_model
from ..processes.runs import STRATEGIES, Runs
from ..results import difference
from .teacher import TYPE, taught_recipe

QUIET = Console(quiet=True)

LOSSES: dict[str, Distillation] = {
    "forward": Distillation(),
    "reverse": Distillation(beta=1.0),
    "between": Distillation(beta=0.3),
    "temperature": Distillation(alpha=0.9, temperature=2.0),
    "with cross entropy": Distillation(alpha=0.9, ce_alpha=0.1),
    "all": Distillation(0.7, 0.2, 1.5, 0.4, True),
    "normalized": Distillation(ce_alpha=0.5, normalizes=True),
}


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def taught_batch(most: int = 5) -> dict[str, Tensor]:
    """Two sequences; some labels have fewer tokens of the teacher than others."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 262, (2, 12), generator=draw)
    labels = tokens.clone()
    labels[0, :5] = labels[1, :9] = -100
    ids = torch.rand(2, 12, 262, generator=draw).argsort(-1)[..., :most]
    teacher = torch.randn(2, 12, most, generator=draw) - 3.0
    teacher[:, ::2, 3:] = -torch.inf
    teacher[labels == -100] = -torch.inf
    return {"input_ids": tokens, "labels": labels, IDS: ids, LOGPROBS: teacher}


def formula(loss: Distillation, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of all trained tokens, one by one, in float64."""
    total = logits.new_zeros((), dtype=torch.float64)
    for row, places in enumerate(batch["labels"] != -100):
        for t in places.nonzero()[:, 0].tolist():
            z = logits[row, t - 1].double()
            named = batch[LOGPROBS][row, t] > -torch.inf
            ids, said = batch[IDS][row, t][named], batch[LOGPROBS][row, t][named].double()
            p = said.exp() ** (1 / loss.temperature)
            p = p / p.sum()
            q = torch.softmax(z / loss.temperature, -1)[ids]
            q = q / q.sum() if loss.normalizes else q
            if loss.beta in (0.0, 1.0):
                a, b = (p, q) if loss.beta == 0.0 else (q, p)
                divergence = (a * (a / b).log()).sum()
            else:
                m = loss.beta * p + (1 - loss.beta) * q
                divergence = loss.beta * (p * (p / m).log()).sum()
                divergence = divergence + (1 - loss.beta) * (q * (q / m).log()).sum()
            total = total + loss.alpha * loss.temperature**2 * divergence
            total = total - loss.ce_alpha * torch.log_softmax(z, -1)[batch["labels"][row, t]]
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimized", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_formula(name: str, optimized: bool) -> None:
    """Of an optimized model, no logits are computed."""
    loss, batch = LOSSES[name], taught_batch()
    exact = make_model().double()
    expected = formula(loss, exact(batch["input_ids"]).logits, batch)
    expected.backward()
    model = make_model()
    report = optimize(model, codegen="eager") if optimized else None
    logits = model(batch["input_ids"]).logits.float()
    total = loss.total(logits, batch["labels"], batch[IDS], batch[LOGPROBS])
    total.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    found = gradients(model)
    for key, grad in gradients(exact).items():
        torch.testing.assert_close(found[key].double(), grad, rtol=1e-4, atol=1e-6)
    if optimized:
        assert logits.is_pending, report


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    model, batch = make_model(), taught_batch()
    batch["labels"].fill_(-100)
    batch[LOGPROBS].fill_(-torch.inf)
    for loss in LOSSES.values():
        logits = model(batch["input_ids"]).logits
        total = loss.total(logits, batch["labels"], batch[IDS], batch[LOGPROBS])
        total.backward()
        assert total.item() == 0.0
    assert all(bool((g == 0).all()) for g in gradients(model).values())
    assert len(gradients(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("optimized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_learns_what_the_teacher_says(optimized: bool, base: Path, tmp_path: Path) -> None:
    keys = {"eval_steps": 6, "max_steps": 12, "optimize": optimized, "learning_rate": 5e-2}
    result = train(taught_recipe(base, tmp_path, **keys), console=QUIET)
    assert result.status == "finished"
    assert result.val_loss_after < result.val_loss_before
    assert [e["step"] for e in result.history if "eval_loss" in e] == [0, 6, 12]
    assert not any("eval_perplexity" in entry for entry in result.history)
    made = fusewright("eval", tmp_path / "out", "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["loss"] == pytest.approx(result.val_loss_after, rel=1e-5)
    assert found["results"]["validation"]["perplexity"] is None


@pytest.mark.long
def test_an_optimized_run_and_one_in_packs_train_what_a_plain_one_does(
    base: Path, tmp_path: Path
) -> None:
    """All rows in each step, however they are divided; the logits are never computed."""
    keys = {"max_steps": 3, "val_set_size": 0}
    whole = {"micro_batch_size": 40, "gradient_accumulation_steps": 1}
    ways: dict[str, dict[str, Any]] = {
        "plain": whole,
        "accumulated": {"micro_batch_size": 4, "gradient_accumulation_steps": 10},
        "optimized": {**whole, "optimize": True},
        "packed": {
            "sample_packing": True, "sequence_len": 2048, "micro_batch_size": 1,
            "gradient_accumulation_steps": 10,
        },
    }  # fmt: skip
    losses, weights = {}, {}
    for name, way in ways.items():
        folder = str(tmp_path / name)
        result = train(
            taught_recipe(base, tmp_path, output_dir=folder, **keys, **way), console=QUIET
        )
        losses[name] = [entry["loss"] for entry in result.history if "loss" in entry]
        weights[name] = adapter(tmp_path / name)
    for name in ways:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4), name
        assert difference(weights[name], weights["plain"]) < 1e-3, name
    written = json.loads((tmp_path / "optimized" / "run.json").read_text(encoding="utf-8"))
    assert written["optimize"]["logits"] == "in tiles: cross entropy 3x, log-probabilities 3x"


def test_a_run_that_resumes_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    keys = {"save_steps": 3, "eval_steps": 3, "max_steps": 6, "logging_steps": 2}
    recipes = {
        name: taught_recipe(base, tmp_path, output_dir=str(tmp_path / name), **keys)
        for name in ("whole", "rest", "other")
    }
    whole = train(recipes["whole"], console=QUIET)
    start = str(tmp_path / "whole" / "checkpoint-3")
    rest = train(recipes["rest"], console=QUIET, resume_from_checkpoint=start)
    one, other = adapter(tmp_path / "whole"), adapter(tmp_path / "rest")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rest.val_loss_after == whole.val_loss_after
    with pytest.raises(RecipeError, match="kd_temperature"):
        train(
            recipes["other"], console=QUIET, resume_from_checkpoint=start, kd_temperature=3.0
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_processes_train_what_one_does(
    strategy: str, optimized: bool, base: Path, tmp_path: Path
) -> None:
    """The 17 batches of an epoch do not go round, nor do the 3 to validate on."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    runs = Runs(base, tmp_path)
    keys = taught_recipe(base, tmp_path)
    for name in ("output_dir", "max_steps", "gradient_accumulation_steps"):
        del keys[name]
    keys |= {"num_epochs": 2, "sample_packing": None, "eval_steps": 5, "optimize": optimized}
    run, one = runs.several("two", **keys, **STRATEGIES[strategy]), runs.alone(**keys)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert run.curve(key) == [
            (step, pytest.approx(value, rel=1e-4)) for step, value in one.curve(key)
        ], key
    assert difference(run.weights(), one.weights()) < 1e-4
    assert run.json["steps"] == one.json["steps"] == 18
    assert run.json["trained_tokens"] == one.json["trained_tokens"]


def test_keys_are_those_of_the_loss() -> None:
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b", "type": TYPE}], "kd_trainer": True}
    assert DistillationTask(load_recipe(keys)).loss.distillation == Distillation()
    more = {
        "kd_alpha": 0.5, "kd_ce_alpha": 0.25, "kd_temperature": 3, "kd_beta": 1,
        "kd_top_k_before_softmax": True,
    }  # fmt: skip
    made = DistillationTask(load_recipe({**keys, **more})).loss.distillation
    assert made == Distillation(0.5, 0.25, 3.0, 1.0, True)


def test_verify_says_what_to_compare_instead(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(taught_recipe(base, tmp_path)), encoding="utf-8")
    said = refused("verify", path)
    assert "trains with a teacher (kd_trainer): compare train with optimize: true" in said
