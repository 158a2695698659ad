"""What two runs differ in, for runs that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.rewrite.verify import STRIDES, UNWRITABLE, Outcome, difference

ONES = torch.ones(4, 3)
OFF = ONES.clone()
OFF[1, 2] = 1.5


def _run(
    outputs: list[Tensor | None],
    grads: list[Tensor | None] | None = None,
    again: list[Tensor | None] | None = None,
    written: list[Tensor | None] | None = None,
    traits: frozenset[str] = frozenset(),
    random: tuple[bytes, ...] = (b"state",),
    draws: int = 1,
) -> Outcome:
    """A run; by default with two gradients, and no write into three inputs."""
    grads = [ONES, ONES * 2] if grads is None else grads
    again = grads if again is None else again
    return Outcome((outputs, grads, again, written or [None] * 3), traits, random, 0, draws)


RIGHT = _run([ONES, ONES * 3])


def _wide(run: Outcome) -> Outcome:
    results = tuple([None if t is None else t.double() for t in kind] for kind in run.results)
    return replace(run, results=results)


def _said(ours: Outcome, theirs: Outcome = RIGHT, exact: Outcome | None = None, **rest: Any) -> Any:
    return difference(ours, theirs, _wide(theirs) if exact is None else exact, **rest)


def test_equal_runs_do_not_differ() -> None:
    assert _said(RIGHT) is None
    assert _said(RIGHT, within_range=True) is None
    none = _run([ONES], [None, ONES], written=[None, ONES, None])
    assert _said(none, none) is None


def test_how_many_outputs() -> None:
    assert _said(_run([ONES])) == "1 outputs instead of 2"
    assert _said(_run([ONES] * 3), _run([ONES])) == "3 outputs instead of 1"


def test_a_result_that_only_one_has() -> None:
    two = [ONES, ONES * 3]
    for grads, which in (([ONES, None], "original"), ([None, ONES * 2], "original")):
        place = grads.index(None)
        expected = f"gradient of input {place}: only the {which} has it"
        assert _said(_run(two, grads)) == expected
    theirs = _run(two, [ONES, None])
    assert _said(RIGHT, theirs) == "gradient of input 1: only the rewrite has it"
    again = _run(two, again=[ONES, None])
    expected = "gradient by a second backward of input 1: only the original has it"
    assert _said(again) == expected
    written = _run(two, written=[None, None, ONES])
    assert _said(written) == "only the rewrite writes to input 2"
    assert _said(RIGHT, written) == "only the original writes to input 2"


def test_random_numbers() -> None:
    for state in (b"a", b"z"):
        found = _said(replace(RIGHT, random=(state,)))
        assert found == "the rewrite draws other random numbers than the original"
    assert _said(replace(RIGHT, random=())) is not None


def test_traits() -> None:
    def said(ours: set[str], theirs: set[str]) -> Any:
        mine = replace(RIGHT, traits=frozenset(ours))
        return _said(mine, replace(RIGHT, traits=frozenset(theirs)))

    assert said({"b", "a"}, {"a", "c"}) == "of the rewrite only: b"
    assert said({"a"}, {"a", "c", "b"}) == "of the original only: b"
    assert said({"a"}, {"a"}) is None
    fixed, laid_out = f"output 0 {UNWRITABLE}", f"output 0 {STRIDES} (1, 4)"
    # it need not share these
    assert said({"a"}, {"a", fixed, laid_out}) is None
    assert said({"a", fixed}, {"a"}) == f"of the rewrite only: {fixed}"
    assert said({"a", laid_out}, {"a"}) == f"of the rewrite only: {laid_out}"


def test_another_shape_or_dtype_is_said_with_the_values() -> None:
    traits = frozenset({"output 0 shares memory with input 0"})
    for other, text in ((ONES[None], "shape (1, 4, 3)"), (ONES.double(), "dtype torch.float64")):
        for outputs, place in (([other, ONES * 3], 0), ([ONES, other], 1)):
            found = _said(_run(outputs, traits=traits))
            assert found is not None
            assert found.startswith(f"output {place}: {text} instead of")
    grown = _run([ONES[:, :2], ONES * 3], traits=traits)
    assert _said(grown).startswith("output 0: shape (4, 2) instead of (4, 3)")


def test_where_the_values_are_wrong() -> None:
    two = [ONES, ONES * 3]
    assert _said(_run([OFF, ONES * 3])).startswith("output 0: rms error")
    assert _said(_run([ONES, OFF * 3])).startswith("output 1: rms error")
    assert _said(_run(two, [OFF, ONES * 2])).startswith("gradient of input 0: rms error")
    assert _said(_run(two, [ONES, OFF * 2], [ONES, ONES * 2])).startswith(
        "gradient of input 1: rms"
    )
    second = _run(two, again=[ONES, OFF * 2])
    assert _said(second).startswith("gradient by a second backward of input 1: rms error")
    wrote, wrong = _run(two, written=[None, ONES, None]), _run(two, written=[None, OFF, None])
    assert _said(wrote, wrote) is None
    assert _said(wrong, wrote).startswith("input 1: rms error")


def test_results_that_neither_has_are_passed_by() -> None:
    theirs = _run([ONES], [None, ONES])
    assert _said(_run([ONES], [None, OFF]), theirs).startswith("gradient of input 1")


def test_one_backward_in_fp64_is_the_truth_of_both() -> None:
    # in fp64 there is no second one
    exact = _wide(_run([ONES, ONES * 3], again=[None, None]))
    assert _said(RIGHT, exact=exact) is None
    missing = _wide(_run([ONES, ONES * 3], [ONES, None]))
    assert _said(RIGHT, exact=missing) == "gradient of input 1: there is none in fp64"


# ------------------------------------------------------------------------------------- within range


def _one(ours: Tensor, eager: Tensor, exact: Tensor | None = None, draws: int = 1) -> Any:
    """What is said of one output within range."""
    mine, theirs = (_run([t], [], draws=draws) for t in (ours, eager))
    truth = _run([eager.double() if exact is None else exact], [])
    return _said(mine, theirs, truth, within_range=True)


def _with(t: Tensor, value: float) -> Tensor:
    changed = t.clone()
    changed[2, 1] = value
    return changed


def test_where_the_original_is_not_finite_the_rewrite_may_have_anything() -> None:
    lost = _with(ONES, torch.inf)
    for value in (torch.inf, torch.nan, 5.0):
        assert _one(_with(ONES, value), lost, ONES.double()) is None
        assert _one(_with(ONES, value), ONES, _with(ONES.double(), torch.inf)) is None
    # but everywhere else it is compared
    assert "rms error" in _one(_with(OFF, torch.nan), lost, ONES.double())
    assert "it is not finite where the original is" in _one(lost, ONES)
    # and nothing is forgiven in the first regime
    mine, theirs = _run([ONES], []), _run([lost], [])
    assert "the other way round" in _said(mine, theirs, _wide(_run([ONES], [])))


def test_what_is_too_small_for_the_dtype_is_not_compared() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    base = ONES * tiny * 4
    assert _one(_with(base, tiny / 2), _with(base, tiny / 4)) is None
    assert "error" in _one(_with(base, tiny * 3), base)
    # a value at the limit counts
    assert "error" in _one(_with(base, tiny * 4), _with(base, tiny))
    # nor does it count as one
    assert _one(torch.zeros(4, 3), torch.full((4, 3), tiny / 2)) is None


def test_integers_are_compared_as_they_are() -> None:
    numbers = torch.arange(12).view(4, 3)
    assert _one(numbers, numbers) is None
    assert "error" in _one(_with(numbers, 8), numbers)


def test_another_shape_within_range() -> None:
    assert _one(ONES[:2], ONES) == "output 0: shape (2, 3) instead of (4, 3)"


@pytest.mark.parametrize("small", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("large", [0, 2])
def test_a_wrong_draw_beside_a_larger_one(large: int, small: float) -> None:
    scale = torch.full((3, 1), small)
    scale[large] *= 1e6
    right, wrong = torch.ones(3, 5) * scale, torch.ones(3, 5)
    wrong[1, 4] = 1.01
    wrong *= scale
    assert _one(right, right, draws=3) is None
    assert "error" in _one(wrong, right, draws=3)
    # of one draw alone, the largest numbers of a tensor are its measure
    assert _one(wrong, right, draws=1) is None


def test_draws_are_levelled_without_rounding() -> None:
    third = torch.full((3, 4), 1 / 3)
    third[1] *= 3e-5
    third[2] = 0
    off = third * (1 + 3 * torch.finfo(torch.float32).eps)
    assert "error" in _one(off, third, draws=3)
    # the error that eager has, once and one and a half times
    near = third.double() * (1 + 1e-7)
    assert _one(third, third, near, draws=3) is None
    zero = torch.zeros(2, 3)
    assert _one(zero, zero, draws=2) is None
    assert _one(zero + 1e-9, zero, draws=2) is None
    assert "error" in _one(zero + 1e-3, zero, draws=2)


def test_draws_of_any_rank() -> None:
    for shape in ((2,), (2, 3), (2, 3, 4)):
        right = torch.ones(shape)
        right[0] *= 1e5
        wrong = right.clone()
        wrong[1] *= 1.01
        assert _one(right, right, draws=2) is None
        assert "error" in _one(wrong, right, draws=2)
