"""The verdict on made-up figures, with what can be wrong with them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fusewright.auditing.drift import kind_of
from fusewright.train.proof.compare import (
    ALL,
    CHANGES,
    GRADIENTS,
    Allowed,
    Deviations,
    deviations,
    drift_of,
    exceeded,
    may_be_luck,
    over_draws,
)

NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.default.weight"
FP32 = torch.finfo(torch.float32).eps


def _write(
    folder: Path, gradients: dict[str, Tensor], changes: dict[str, Tensor], step: int = 0
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(gradients, folder / GRADIENTS.format(step))
    save_file(changes, folder / CHANGES)
    return folder


def _tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        NAME.format(layer, letter): torch.randn(20, 30, generator=generator)
        for layer in (0, 1)
        for letter in "AB"
    }


def _off(
    tmp_path: Path, own: dict[str, Tensor], losses: list[float], changes: Any = None
) -> Deviations:
    exact = _tensors()
    reference = _write(tmp_path / "exact", exact, exact)
    folder = _write(tmp_path / "own", own, exact if changes is None else changes)
    return deviations({"losses": losses}, folder, {"losses": [2.0, 1.0]}, reference)


GOOD = Allowed.of(
    Deviations((1e-6, 1e-6), {ALL: 1e-6, "q_proj": 1e-6}, 1e-6), "float32", tokens=1024
)


def _found(**changes: Any) -> Deviations:
    values = {
        "losses": (1e-6, 1e-6), "gradients": {ALL: 1e-6, "q_proj": 1e-6}, "change": 1e-6,
    }  # fmt: skip
    return Deviations(**{**values, **changes})


def test_the_same_is_off_by_nothing(tmp_path: Path) -> None:
    found = _off(tmp_path, _tensors(), [2.0, 1.0])
    assert found.losses == (0, 0)
    assert set(found.gradients.values()) == {0}
    assert found.change == 0
    assert not exceeded(found, Allowed.of(found, "float32", 100))


def test_a_factor_is_its_own_deviation_in_every_kind(tmp_path: Path) -> None:
    off = {name: t * 1.01 for name, t in _tensors().items()}
    found = _off(tmp_path, off, [2.02, 0.99])
    kinds = ["self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B"]
    assert sorted(found.gradients) == sorted([ALL, *kinds])
    assert all(d == pytest.approx(0.01, rel=1e-4) for d in found.gradients.values())
    assert found.losses == pytest.approx((0.01, 0.01))


def test_a_kind_that_is_wrong_is_named_though_all_of_it_is_small(tmp_path: Path) -> None:
    exact = {name: t * (1e-4 if "lora_A" in name else 1) for name, t in _tensors().items()}
    reference = _write(tmp_path / "exact", exact, exact)
    own = {name: t * (1.5 if "lora_A" in name else 1) for name, t in exact.items()}
    folder = _write(tmp_path / "own", own, exact)
    figures = {"losses": [2.0, 1.0]}
    found = deviations(figures, folder, figures, reference)
    assert found.gradient < 1e-4
    limits = Allowed.of(Deviations((0, 0), dict.fromkeys(found.gradients, 1e-3), 0), "float32", 100)
    (said,) = exceeded(found, limits)
    assert "q_proj.lora_A" in said
    assert "q_proj.lora_B" not in said
    assert "5.0e-01" in said


def test_few_weights_that_went_the_other_way_do_not_count(tmp_path: Path) -> None:
    changes = _tensors()
    for t in changes.values():
        t.view(-1)[:3] *= -1  # of 600
    assert _off(tmp_path, _tensors(), [2.0, 1.0], changes).change == 0


def test_a_twentieth_of_the_weights_counts(tmp_path: Path) -> None:
    changes = _tensors()
    for t in changes.values():
        t.view(-1)[:30] *= -1
    assert _off(tmp_path, _tensors(), [2.0, 1.0], changes).change > 0.1


def test_a_nan_among_the_weights_is_not_left_out(tmp_path: Path) -> None:
    changes = _tensors()
    next(iter(changes.values()))[0, 0] = math.nan
    found = _off(tmp_path, _tensors(), [2.0, 1.0], changes)
    assert math.isnan(found.change)
    assert any("change" in said for said in exceeded(found, GOOD))


def test_a_nan_gradient_fails(tmp_path: Path) -> None:
    own = _tensors()
    own[NAME.format(1, "B")][0, 0] = math.nan
    said = exceeded(_off(tmp_path, own, [2.0, 1.0]), GOOD)
    assert any("lora_B (off by nan" in clause for clause in said)


@pytest.mark.parametrize("losses", [[2.0, math.nan], [2.0, math.inf]])
def test_a_loss_that_is_not_finite_fails_once(tmp_path: Path, losses: list[float]) -> None:
    found = _off(tmp_path, _tensors(), losses)
    said = exceeded(found, Allowed.of(_found(), "float32", 100))
    assert [clause for clause in said if "loss" in clause] == [f"the loss of step 2 is {losses[1]}"]


@pytest.mark.parametrize(("losses", "number"), [([2.0], 1), ([2.0, 1.0, 0.5], 3), ([], 0)])
def test_another_number_of_steps_fails(tmp_path: Path, losses: list[float], number: int) -> None:
    found = _off(tmp_path, _tensors(), losses)
    assert f"it has made {number} steps and the reference 2" in exceeded(found, GOOD)


def test_a_missing_gradient_fails(tmp_path: Path) -> None:
    own = _tensors()
    del own[NAME.format(0, "A")], own[NAME.format(1, "A")]
    said = exceeded(_off(tmp_path, own, [2.0, 1.0]), GOOD)
    assert f"it has no gradient for {NAME.format(0, 'A')} and 1 more" in said


def test_a_gradient_too_many_fails(tmp_path: Path) -> None:
    own = {**_tensors(), "extra.weight": torch.ones(2)}
    said = exceeded(_off(tmp_path, own, [2.0, 1.0]), GOOD)
    assert "it has a gradient, which the reference has not, for extra.weight" in said


def test_no_gradients_at_all_fail() -> None:
    assert "it has no gradients" in exceeded(_found(gradients={}), GOOD)


def test_the_limit_is_one_and_a_half_times_eager_and_a_unit() -> None:
    limits = Allowed.of(_found(), "bfloat16", tokens=1024)
    unit = 2.0**-7
    assert limits.gradients["q_proj"] == pytest.approx(1.5e-6 + unit)
    assert limits.change == pytest.approx(1.5e-6 + unit)
    assert limits.losses == pytest.approx((1.5e-6 + unit + 5 * FP32,) * 2)


def test_the_unit_of_later_losses_grows_as_the_weights_drift() -> None:
    eager = _found(losses=(0.0, 0.0), change=4e-6)
    first, second = Allowed.of(eager, "float32", tokens=1024).losses
    assert first == pytest.approx(6 * FP32)
    assert second == pytest.approx(4 * first)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"losses": (1.5e-6, 4e-6)}, "the loss of step 2 is off by 4.0e-06"),
        ({"gradients": {ALL: 1e-6, "q_proj": 2e-6}}, "q_proj (off by 2.0e-06, allowed 1.6e-06)"),
        ({"gradients": {ALL: 2e-6, "q_proj": 1e-6}}, "differ in all"),
        ({"gradients": {ALL: 1e-6, "k_proj": 1e-6}}, "k_proj (off by 1.0e-06, allowed nan)"),
        ({"change": 1e-5}, "the weights' change is off by 1.0e-05"),
    ],
)
def test_beyond_the_limit(changes: dict[str, Any], word: str) -> None:
    (said,) = exceeded(_found(**changes), GOOD)
    assert word in said


def test_just_within_the_limit() -> None:
    found = _found(
        losses=GOOD.losses, gradients=dict(GOOD.gradients), change=GOOD.change
    )  # fmt: skip
    assert not exceeded(found, GOOD)


@pytest.mark.parametrize(
    ("changes", "luck"),
    [
        ({"gradients": {ALL: 1e-6, "q_proj": 9e-6}}, True),
        ({"losses": (9e-6, 1e-6)}, True),
        ({"gradients": {ALL: 1e-6, "q_proj": 9e-5}}, False),  # no luck goes that far
        ({"gradients": {ALL: math.nan, "q_proj": 9e-6}}, False),
        ({"losses": (9e-5, 1e-6)}, False),
        ({"gradients": {ALL: 1e-6, "q_proj": 9e-6}, "change": 1e-5}, False),  # it fails anyway
        ({"gradients": {ALL: 1e-6, "q_proj": 9e-6}, "losses": (1e-6, 9e-6)}, False),
        ({"gradients": {ALL: 1e-6, "q_proj": 9e-6}, "problems": ("it has made 1 step",)}, False),
    ],
)
def test_what_another_first_step_could_decide(changes: dict[str, Any], luck: bool) -> None:
    found = _found(**changes)
    assert exceeded(found, GOOD)
    assert may_be_luck(found, GOOD) == luck


@pytest.mark.parametrize(("size", "verdict"), [(1.0, "passed"), (2.0, "failed")])
def test_draws_are_judged_together(tmp_path: Path, size: float, verdict: str) -> None:
    """Errors as large as eager's on average pass, and twice as large ones fail, in any draw."""
    one, other = 0.3, 1.7
    for step in range(2):
        exact = _tensors(step)
        noise = _tensors(10 + step)
        sizes = {"exact": 0.0, "eager": (one, other)[step], "own": size * (other, one)[step]}
        for name, factor in sizes.items():
            own = {key: t + 1e-3 * factor * noise[key] for key, t in exact.items()}
            _write(tmp_path / name, own, exact, step)

    def off(name: str, *losses: float) -> Deviations:
        first = _found(losses=(9.0, 1e-6), gradients={ALL: 9.0})
        figures = {"losses": [2.0, 1.0]}
        return over_draws(
            first, {"losses": list(losses)}, tmp_path / name, figures, tmp_path / "exact"
        )

    limits = Allowed.of(off("eager", 2.0 + 2e-5, 1.0), "float32", 100)
    found = off("own", 2.0, 1.0 - size * 2e-5)
    assert (found.draws, found.change, found.losses[1]) == (2, 1e-6, 1e-6)
    assert found.losses[0] == pytest.approx(size * 2e-5 / 5**0.5, rel=1e-6)
    square = (one**2 + other**2) / 2
    assert found.gradient == pytest.approx(size * 1e-3 * square**0.5, rel=0.1)
    said = exceeded(found, limits)
    assert bool(said) == (verdict == "failed")
    if said:
        assert said[0].startswith("the gradients of 2 steps with the initial weights differ in ")
        assert said[1].startswith("the loss of step 1 is off by ")
    folders = (tmp_path / "own", tmp_path / "eager", tmp_path / "exact")
    assert len(drift_of(*folders, "float32", 200)) == 6


def test_a_gradient_that_one_draw_lacks_is_a_problem(tmp_path: Path) -> None:
    exact = _tensors()
    for step in range(3):
        _write(tmp_path / "exact", exact, exact, step)
        lacking = dict(list(exact.items())[:-1]) if step == 1 else exact
        _write(tmp_path / "own", lacking, exact, step)
    figures = {"losses": [1.0] * 3}
    found = over_draws(_found(), figures, tmp_path / "own", figures, tmp_path / "exact")
    assert found.problems == (f"it has no gradient for {list(exact)[-1]}",)


def test_where_eager_is_nan_nothing_passes() -> None:
    eager = _found(losses=(1e-6, math.nan), gradients={ALL: math.nan}, change=math.nan)
    said = exceeded(_found(gradients={ALL: 1e-6}), Allowed.of(eager, "float32", 100))
    assert len(said) == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (NAME.format(12, "A"), "self_attn.q_proj.lora_A"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "up_proj"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("transformer.h.0.ln_1.bias", "ln_1.bias"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_gradients_that_are_truncated_have_a_bias(tmp_path: Path) -> None:
    exact = _tensors()
    noisy = {name: t * (1 + 1e-3 * torch.randn(t.shape)) for name, t in exact.items()}
    folders = {
        "exact": exact,
        "eager": {name: t.bfloat16() for name, t in exact.items()},
        "rounded": {name: t.bfloat16() for name, t in noisy.items()},
        "truncated": {
            name: (t.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()
            for name, t in noisy.items()
        },
    }
    written = {name: _write(tmp_path / name, of, exact) for name, of in folders.items()}
    for name, biased in (("rounded", False), ("truncated", True)):
        found = drift_of(written[name], written["eager"], written["exact"], "bfloat16", 10_000)
        assert any(drift.exceeded for drift in found) == biased
        limits = Allowed.of(_found(), "bfloat16", 100)
        said = exceeded(dataclasses.replace(_found(), drift=found), limits)
        assert [s.split(" by ")[0].split(" are ")[1] for s in said] == ["too small"] * biased
