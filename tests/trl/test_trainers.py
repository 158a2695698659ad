"""TRL's trainers on an optimized model: what they log and train is what they do on a plain one.

Their heads compute in our tiles, and no tensor of tokens x vocabulary is made.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

pytest.importorskip("trl", reason="the trainers are TRL's (pip install trl)")

from fusewright import optimize, restore
from fusewright.compiler.install import active
from fusewright.compiler.logits.lazy_logits import Buffer, LazyLogits
from fusewright.compiler.logits.reads import Reads
from tests.explained import explain

from ..models.zoo import build
from .trainers import KINDS, LLAMA, model_for, run, trainer

VOCABULARY = 211
OWN = ("Distillation", "GKD")
"""Trainers with tiles of their own, or with divergences over all of the vocabulary."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


_optimized = functools.partial(optimize, codegen="eager")


@functools.cache
def _plain(kind: str, lora: bool) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return run(trainer(kind, model_for(kind), Path(folder), lora))


def _reads(model: nn.Module) -> Reads:
    record = next(r for r in map(active, model.modules()) if r is not None)
    return record.session.log.reads


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all logits and gradients of logits that were computed."""
    shapes: list[tuple[int, ...]] = []
    was = Buffer.fill

    def counted(self: Buffer) -> Tensor:
        is_new, values = self.values is None, was(self)
        if is_new:
            shapes.append(tuple(values.shape))
        return values

    monkeypatch.setattr(Buffer, "fill", counted)
    return shapes


def _same(kind: str, lora: bool, order: str, folder: Path) -> None:
    model = model_for(kind)
    if order == "before":
        model = _optimized(model)
    made = trainer(kind, model, folder, lora, change=_optimized)
    if order == "after":
        _optimized(made.model)
    logged, trained = run(made)
    expected, weights = _plain(kind, lora)
    assert len(logged) == len(expected)
    for mine, theirs in zip(logged, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if "accuracies" not in name:  # of equal rewards in the first step
                assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), name
    for name, value in trained.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=5e-5, msg=name)
    report, reads = explain(made.model), _reads(made.model)
    assert report.by_rule()["rms_norm"] == 5
    if kind == "GKD":  # it compares all classes of two models
        assert reads.tensors.total() > 0
    elif kind not in (*OWN, "Reward"):
        assert report.logits.startswith("in tiles: ")
        assert reads.tensors.total() == 0, reads.reasons()
        for failure in ("was put in the place", "no call with labels"):
            assert not any(failure in b.reason for b in report.bypasses)


QUICK = [
    ("DPO", False, "before"), ("GRPO", True, "before"), ("ORPO", False, "after"),
    ("GKD", False, "before"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "lora", "order"), QUICK)
def test_a_trainer(kind: str, lora: bool, order: str, tmp_path: Path) -> None:
    _same(kind, lora, order, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_each_trainer(kind: str, lora: bool, order: str, tmp_path: Path) -> None:
    _same(kind, lora, order, tmp_path)


@pytest.mark.long("KTO", "CPO")
@pytest.mark.parametrize("kind", ["KTO", "CPO"])
def test_no_logits_and_no_gradients_of_logits_are_made(
    kind: str, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    made = trainer(kind, _optimized(model_for(kind)), tmp_path, False)
    run(made)
    assert computed == []
    z = made.model(input_ids=torch.arange(3, 15).view(2, 6)).logits
    assert isinstance(z, LazyLogits)
    z.sum().backward()
    assert computed == [(2, 6, VOCABULARY)]


@pytest.mark.parametrize("order", ["before", "after"])
def test_restore_gives_the_forward_of_the_trainer_back(order: str, tmp_path: Path) -> None:
    model = model_for("SFT")
    if order == "before":
        _optimized(model)
    made = trainer("SFT", model, tmp_path, False)
    theirs = model.forward
    if order == "after":
        _optimized(model)
    model.train()
    ids = torch.arange(3, 15).view(2, 6)
    mine = model(input_ids=ids, labels=ids, fused_lm_head=True)
    reads = _reads(model)
    assert reads.heads.total() == 1
    assert model.forward.__func__ is not theirs.__func__
    restore(model)
    assert model.forward.__func__ is theirs.__func__
    assert "train" not in vars(model.model)
    plain = made.model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(mine.log_probs, plain.log_probs)
    assert reads.heads.total() == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_the_wrappers_of_accelerate_are_kept(bf16: bool, tmp_path: Path) -> None:
    """Under autocast the forward that it wraps computes in our tiles, and its results are fp32."""
    found = []
    for change in (lambda m: m, _optimized):
        made = trainer("DPO", change(model_for("DPO")), tmp_path, False, change=change, bf16=bf16)
        logged, _ = run(made)
        found.append([entry["loss"] for entry in logged if "loss" in entry])
        if change is _optimized:
            assert _reads(made.model).heads.total() >= 3
    assert found[1] == pytest.approx(found[0], rel=2e-2 if bf16 else 1e-4)


def _logged(model: nn.Module, folder: Path, **given: Any) -> list[float]:
    function = given.pop("compute_loss_func", None)
    arguments = tf.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3, seed=0, **given,
    )  # fmt: skip
    ids = torch.arange(3, 3 + 8 * 12).view(8, 12) % VOCABULARY
    rows = [{"input_ids": row, "labels": row.masked_fill(row % 5 == 0, -100)} for row in ids]
    made = tf.Trainer(model, arguments, train_dataset=rows, compute_loss_func=function)
    made.train()
    return [e[k] for e in made.state.log_history for k in ("loss", "grad_norm") if k in e]


def _shifted(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = outputs.logits[..., :-1, :]
    return logits.reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)


def _focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    nll = F.cross_entropy(*_shifted(outputs, labels), reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum() / num_items_in_batch


def _z_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = _shifted(outputs, labels)
    return F.cross_entropy(logits, labels) + 1e-2 * logits.logsumexp(-1).square().mean()


def _dft(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As TRL's ``dft_loss`` does."""
    logits, labels = _shifted(outputs, labels)
    mask = labels != -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(logp.exp().detach() * logp * mask).sum() / num_items_in_batch


def _entropy_aware(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = _shifted(outputs, labels)
    logp = F.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return (F.nll_loss(logp, labels, reduction="none") * entropy).sum() / num_items_in_batch


@pytest.mark.parametrize(
    "given",
    [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0},
     *({"compute_loss_func": f} for f in (_focal, _z_loss, _dft, _entropy_aware))],
    ids=["label smoothing", "neftune", "focal", "z-loss", "dft", "entropy"],
)  # fmt: skip
def test_a_loss_of_the_caller_in_the_trainer_of_transformers(given: Any, tmp_path: Path) -> None:
    expected = _logged(build(LLAMA, lora=False), tmp_path, **given)
    model = _optimized(build(LLAMA, lora=False))
    assert _logged(model, tmp_path, **given) == pytest.approx(expected, rel=1e-4)
    if (
        given.get("compute_loss_func") is _entropy_aware
    ):  # it reads the probabilities of all classes
        assert {kind for _, kind, _ in _reads(model).tensors} == {"log_probs"}
        return
    assert _reads(model).tensors.total() == 0, _reads(model).reasons()
    if "neftune_noise_alpha" not in given:
        assert _reads(model).tiles.total() >= 3
