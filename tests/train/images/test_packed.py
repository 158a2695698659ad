"""Samples with images that share a row are trained as each would be by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train.trainer.ready import require_packing_of_images

from ...versions import transformers_before
from .families import FAMILIES
from .training import Rows, checkpoint, gradients, small, summed, write_rows

MIXING = () if transformers_before("5.24") else ("gemma3", "gemma4")
"""Families whose masks of images are for rows of one sample, in transformers 5.24."""

RECURRENT = ("qwen3_5",)
"""Families whose recurrent layers keep samples apart in an optimized model only."""

LENGTH = 256


def model_of(family: str) -> Any:
    """All of it is trained."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint(family), dtype=torch.float32
    )
    return model.train()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 9)


def rows_of(family: str, written: Path, **keys: Any) -> Rows:
    asked = {"sequence_len": LENGTH, "sample_packing": True, **keys}
    return Rows.of(small(family, written, written.parent / "out", **asked))


def measured(model: Any, rows: Rows, packing: bool) -> dict[str, Tensor]:
    """The mean loss, and all gradients."""
    packs = rows.packed(LENGTH) if packing else [[s] for s in rows.samples]
    total = torch.zeros((), dtype=torch.float64)
    for each in packs:
        loss = summed(model, rows.batch(model, [each], packing))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return {"loss": total, **gradients(model)}


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each is off, relative to its size."""
    assert found.keys() == expected.keys()
    largest = max(float(t.norm()) for t in expected.values())
    return {
        name: float((found[name] - t).norm()) / max(float(t.norm()), 1e-6 * largest)
        for name, t in expected.items()
    }


def families(*usual: str, without: tuple[str, ...] = ()) -> list[Any]:
    """All families; ``usual`` ones by default."""
    chosen = (f for f in FAMILIES if f not in without)
    return [f if f in usual else pytest.param(f, marks=pytest.mark.slow) for f in chosen]


@pytest.mark.parametrize(
    "family", families("qwen2_5_vl", "idefics3", without=(*MIXING, *RECURRENT))
)
def test_losses_and_gradients(family: str, written: Path) -> None:
    rows, model = rows_of(family, written), model_of(family)
    packs = rows.packed(LENGTH)
    assert max(sum(s.extra != "" for s in p) for p in packs) > 1
    exact = copy.deepcopy(model).double()
    alone = measured(exact, rows, packing=False)
    assert any("vis" in name or "tower" in name for name in alone)  # towers, too
    # some towers compute in fp32 all the same
    assert max(off(measured(exact, rows, packing=True), alone).values()) < 1e-6


@pytest.mark.parametrize("family", families("qwen2_5_vl", without=MIXING))
def test_losses_and_gradients_of_an_optimized_model(family: str, written: Path) -> None:
    rows, model = rows_of(family, written), model_of(family)
    alone = measured(copy.deepcopy(model).double(), rows, packing=False)
    optimized = optimize(model, packs=True, codegen="eager")
    rounding = off(measured(optimized, rows, packing=False), alone)
    for name, error in off(measured(optimized, rows, packing=True), alone).items():
        assert error < 2 * rounding[name] + 2e-6, name


@pytest.mark.parametrize("family", families("gemma3", "llava"))
def test_masks_of_images_are_refused(family: str, written: Path) -> None:
    rows, model = rows_of(family, written, optimize=True), model_of(family)
    if family not in ("gemma3", "gemma4"):
        require_packing_of_images(model, rows.recipe)
        return
    with pytest.raises(RecipeError, match=r"images of a pack.*; set sample_packing: false$"):
        require_packing_of_images(model, rows.recipe)
    alone = rows_of(family, written, sample_packing=False)
    require_packing_of_images(model, alone.recipe)
