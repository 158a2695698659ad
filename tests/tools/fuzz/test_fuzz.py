"""Random decoder-like models, optimized, do what they do in eager mode.

``python -m tests.tools.fuzz FIRST COUNT`` tries more of them, and prints a script for what fails.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright.kernels.tolerance import exceeded
from fusewright.passes import PIPELINE
from fusewright.passes.glu import GLU

from .compare import _is_eagers_own, _same_bits, check, draw, exact, load, script
from .judge import DRAWS, Failure, Outcome, _is_luck, judge
from .program import Program, generate

_EACH = 12


def _assert_right(seed: int, codegen: str = "eager") -> None:
    program = draw(seed)
    program = dataclasses.replace(program, options={**program.options, "codegen": codegen})
    failure = check(program)
    if failure is not None:
        print(script(program))
    assert failure is None, f"seed {seed}: {failure}"


@pytest.mark.parametrize("seed", range(6))
def test_random_models_do_what_eager_does(seed: int) -> None:
    _assert_right(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1000 + 8 * _EACH, _EACH))
def test_more_random_models_do_what_eager_does(first: int) -> None:
    for seed in range(first, first + _EACH):
        _assert_right(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000, 2004))
def test_random_models_do_through_inductor_what_eager_does(seed: int) -> None:
    _assert_right(seed, "inductor")


def test_a_change_to_a_block_without_linears_finds_another_layer() -> None:
    draw(62459)  # its model is a head on a stack, which has the norm


def test_a_seed_gives_the_same_program_each_time() -> None:
    assert generate(11) == generate(11)
    assert generate(11).source != generate(12).source


def test_the_fp64_form_has_no_other_dtype() -> None:
    for seed in range(20):
        text = exact(generate(seed).source)
        assert "float32" not in text
        assert "bfloat16" not in text
        model = load(text)["build"]()
        assert {str(p.dtype) for p in model.parameters()} == {"torch.float64"}


def test_a_wrong_rewrite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With verification off and gate and up swapped, some programs must fail."""

    def swapped(self: GLU, m: object, ops: object) -> object:
        return ops.glu(m.up, m.gate, m.spelling)  # type: ignore[attr-defined]

    assert any(isinstance(rule, GLU) for rule in PIPELINE)
    monkeypatch.setattr(GLU, "rewrite", swapped)
    kinds = set()
    for seed in range(30):
        program = draw(seed)
        options = {**program.options, "verify": "off"}
        failure = check(dataclasses.replace(program, options=options))
        kinds.add(failure.kind if failure else None)
        if "wrong value" in kinds:
            break
    assert "wrong value" in kinds


def test_an_optimization_that_forgets_hooks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: nn.Module, **options: object) -> nn.Module:
        for m in model.modules():
            m._forward_hooks.clear()
            m.register_forward_hook = lambda hook: None  # type: ignore[method-assign, assignment]
        return model

    monkeypatch.setattr("tests.tools.fuzz.compare.optimize", forgetful)
    found = (f.kind for seed in range(80) if (f := check(draw(seed))) is not None)
    assert any(kind in ("state", "wrong value") for kind in found)


def test_a_few_draws_that_are_far_away_are_luck_and_many_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(480, 8, generator=generator)
    eager, ours = (exact + 1e-3 * torch.randn(480, 8, generator=generator) for _ in range(2))
    eager[:12] += 1
    ours[12:24] += 1
    assert _is_luck(ours, eager, exact)
    assert not _is_luck(ours + 0.01, eager, exact)
    eager[:12] -= 1
    ours[:12] += 1
    assert not _is_luck(ours, eager, exact)  # all that are far away are ours


def test_errors_that_differ_by_a_million_are_compared_draw_by_draw() -> None:
    generator = torch.Generator().manual_seed(2)

    def normal(width: int) -> Tensor:
        return torch.randn(480, width, generator=generator, dtype=torch.float64)

    exact, size = normal(8), 1e-4 * (4 * normal(1)).exp().sort(0).values
    eager, ours = (exact + size * normal(1).exp() * normal(8) for _ in range(2))
    assert exceeded(ours, eager, exact) is not None  # the worst draw is ours
    assert _is_luck(ours, eager, exact)
    assert not _is_luck(exact + 1.6 * (ours - exact), eager, exact)
    for quarter in range(4):  # ours are three times as far in one of them
        part = torch.arange(480)[:, None] // 120 == quarter
        further = torch.where(part, exact + 3 * (ours - exact), ours)
        assert not _is_luck(further, eager, exact)


def test_a_restored_model_gives_eagers_nan_but_nothing_else_that_differs() -> None:
    nan = float("nan")
    assert _same_bits(torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    assert not _same_bits(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]))
    assert not _same_bits(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    assert not _same_bits(None, torch.tensor([1.0]))


def test_what_leaves_the_range_of_fp16_in_eager_alone_is_no_failure() -> None:
    def judged(place: str, ours: list[Any], eager: list[Any]) -> Failure | None:
        exact = Outcome({"loss": torch.ones_like(torch.tensor(eager), dtype=torch.float64)})
        return judge(place, Outcome({"loss": torch.tensor(eager)}),
                     Outcome({"loss": torch.tensor(ours)}), exact)  # fmt: skip

    one, inf = "step 0", float("inf")
    draws = f"step 0, {DRAWS[0]} draws"
    assert judged(one, [1.0, 1.0, 1.0], [1.0, inf, 1.0]) is None
    assert judged(draws, [1.0, 1.0, 1.0], [1.0, inf, 1.0]) is None
    for place in (one, draws):
        failure = judged(place, [1.0, inf, 1.0], [1.0, 1.0, 1.0])
        assert failure is not None
        assert failure.kind == "structure"
    assert judged(draws, [1.0, 1.0, 1.5], [1.0, inf, 1.0]) is not None
    for place, several in ((one, [inf, 1.0]), (draws, [[inf, 1.0], [1.0, inf]])):
        eager = torch.full_like(torch.tensor(several), inf).tolist()
        assert judged(place, several, eager) is None  # some of it leaves the range in both


_WRITTEN_INSIDE_A_CHECKPOINT = """
import torch, torch.nn as nn
from torch.utils.checkpoint import checkpoint

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False)
    def outer(self, x):
        h = x * self.weight
        y = checkpoint(lambda h: (h + 0).sin(), h, use_reentrant=False)
        h.add_(1)
        return (y + h.exp()).sum()

def build():
    return Model()

LOG = []
CHANGES = [lambda model: None]

def step(model, batch):
    loss = model(torch.linspace(0.1, 0.9, 3))
    loss.backward()
    return {"loss": loss}

STEPS = [step]
"""


def test_what_a_checkpoint_computes_from_a_later_write_is_eagers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours are then the gradients without the checkpoint; others are wrong values."""
    program = Program(0, _WRITTEN_INSIDE_A_CHECKPOINT, {}, 0)
    failure = Failure("wrong value", "step 0, gradient of weight", "")

    def excused(scale: float | None) -> bool:
        def optimized(model: nn.Module, **options: object) -> nn.Module:
            own = load(_WRITTEN_INSIDE_A_CHECKPOINT.replace("checkpoint(", "called("))
            own["called"] = lambda function, *args, **kwargs: function(*args)
            model.__class__ = own["Model"]
            if scale is not None:
                model.weight.register_hook(lambda grad: grad * scale)  # type: ignore[operator, union-attr]
            return model

        monkeypatch.setattr("tests.tools.fuzz.compare.optimize", optimized)
        return _is_eagers_own(program, failure, 0, 0)

    assert excused(None)
    assert not excused(1.5)
    assert not _is_eagers_own(program, dataclasses.replace(failure, kind="crash"), 0, 0)
