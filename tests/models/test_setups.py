"""Which rewrites the ordinary set-ups keep, and that each trains as it does in eager."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.kernels.tolerance import FACTOR, errors, unit

from ..versions import transformers_before
from .setups import SETUPS, Setup, build, exact, line, optimized, step
from .test_models import _InDouble, _rms

DRAWS, MOST = 12, 72
"""Draws that a budget is judged by. The loss is a single number: eager's error of it varies by a
factor of two over twelve draws, and so does ours; where that decides, there are more."""

DIFFERENT = {
    "full", "accelerate", "checkpointing", "two-adapters", "dropout", "dora", "dora-checkpointing",
    "kbit-checkpointing", "experts-autocast", "delta",
}  # fmt: skip
"""What the default run and ``pytest -m long`` try; each of the others differs from one in a dtype
or a detail. ``accelerate`` puts autocast around forward."""

PAGE = (Path(__file__).parents[2] / "docs" / "setups.md").read_text()
NEEDS_BNB = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CASES = [
    pytest.param(
        family, setup, id=f"{family}-{name}",
        marks=[*([NEEDS_BNB] if setup.quantized else []),
               *([] if family == setup.families[0] and name in DIFFERENT else [pytest.mark.slow])],
    )
    for name, setup in SETUPS.items()
    for family in setup.families
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _other_weights(models: list[Any], draw: int) -> None:
    """Give all the same slightly different trained weights: the error of given ones is a draw."""
    generator = torch.Generator().manual_seed(draw)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    with torch.no_grad():
        for first, *others in zip(*trained, strict=True):
            first.mul_(1 + 0.1 * torch.randn(first.shape, generator=generator))
            for other in others:
                other.copy_(first)


def over(
    run: Callable[[Any, int, bool], dict[str, Tensor]], ours: Any, eager: Any, truth: Any,
    most: int = MOST, draws: int = DRAWS, pooled: bool = False,
) -> list[str]:  # fmt: skip
    """Which results are beyond the budget: over a few draws, and if one is, over all of them.

    ``run`` (model, draw, whether it is lowered) returns the loss and every gradient. Errors are
    relative to the size of each draw; if ``pooled``, of all together: the gradient of a single
    number can nearly cancel in one draw, whose relative error is then all that a mean sees.
    """
    mine, theirs, exact, units = defaultdict(list), defaultdict(list), defaultdict(list), {}
    for draw in range(most):
        _other_weights([ours, eager, truth], draw)
        found, expected = run(ours, draw, True), run(eager, draw, True)
        with _InDouble():
            right = run(truth, draw, False)
        assert found.keys() == expected.keys() == right.keys()
        for key, value in found.items():
            assert value.dtype is expected[key].dtype
            units[key] = unit(value.dtype)
            mine[key].append(value)
            theirs[key].append(expected[key])
            exact[key].append(right[key])
        if draw + 1 not in (draws, most):
            continue

        def rms(values: list[Tensor], key: str) -> float:
            if pooled:
                return errors(torch.stack(values), torch.stack(exact[key]), len(values)).rms
            return _rms([errors(*pair).rms for pair in zip(values, exact[key], strict=True)])

        off = {key: (rms(mine[key], key), rms(theirs[key], key)) for key in mine}
        beyond = [
            f"{key}: {ours_off:.2e}, eager {eager_off:.2e}"
            for key, (ours_off, eager_off) in off.items()
            if not ours_off <= FACTOR * eager_off + units[key]
        ]
        if not beyond:
            return []
    return beyond


def _over(ours: Any, eager: Any, truth: Any, setup: Setup, most: int = MOST) -> list[str]:
    def run(model: Any, draw: int, lowered: bool) -> dict[str, Tensor]:
        return step(model, setup, draw, lowered)

    return over(run, ours, eager, truth, most)


@pytest.mark.long(
    "Llama-accelerate",
    "Llama-checkpointing",
    "Qwen3Moe-experts-autocast",
    "Qwen3Next-delta",
    "Llama-dora-checkpointing",
    "Llama-dora",
    "Llama-dropout",
    "Llama-kbit-checkpointing",
    "Llama-two-adapters",
)
@pytest.mark.parametrize(("family", "setup"), CASES)
def test_what_is_rewritten_and_how_exact_it_is(family: str, setup: Setup) -> None:
    eager, truth = build(family, setup), exact(family, setup)
    ours, report = optimized(family, setup)
    # the page is of the newest versions; with PyTorch 2.11, PEFT's DoRA breaks captures of blocks
    if not (setup is SETUPS["dora-checkpointing"] and transformers_before("5.24")):
        assert line(family, setup, report) in PAGE.splitlines()
    assert not _over(ours, eager, truth, setup)


def test_the_page_has_no_other_lines() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + sum(len(setup.families) for setup in SETUPS.values())


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        ("fp32", 16.0001),
        ("autocast", 16.6),
        pytest.param("kbit-autocast", 16.6, marks=NEEDS_BNB),
    ],
)
def test_a_scale_that_is_slightly_wrong_is_beyond_the_budget(name: str, alpha: float) -> None:
    setup = SETUPS[name]
    wrong = replace(setup, lora={**(setup.lora or {}), "lora_alpha": alpha})
    eager, truth = build("Llama", setup), exact("Llama", setup)
    assert _over(build("Llama", wrong), eager, truth, setup, DRAWS)
