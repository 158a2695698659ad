"""Plans of recipes whose rows have images."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from fusewright.errors import DataError
from fusewright.train.plan.cards import Card, Devices
from fusewright.train.plan.count.images import row_images
from fusewright.train.plan.page import show, verdict_lines
from fusewright.train.plan.plan import RunPlan, make_plan
from fusewright.train.recipe.load import check
from fusewright.train.recipe.preferences import preference_settings

from ..commands import fusewright
from ..images.families import FAMILIES

CARD = Devices(1, Card("a card", 24 << 30, 1e14, 1e12, 1e11, 1e10))


def planned(folder: Path, family: str, with_images: bool = True, **keys: Any) -> RunPlan:
    base = folder / "base"
    if not base.exists():
        FAMILIES[family].save(base)
        Image.new("RGB", (32, 32), "red").save(folder / "image.png")
    part = [{"type": "image", "path": "image.png"}] if with_images else []
    asked = {"role": "user", "content": [*part, {"type": "text", "text": "which colour?"}]}
    row = {"messages": [asked, {"role": "assistant", "content": "red"}]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    recipe = {
        "base_model": str(base), "datasets": [{"path": str(folder / "rows.jsonl")}],
        "sequence_len": 128, "micro_batch_size": 4, "codegen": "eager", "memory": "speed",
        "output_dir": str(folder / "out"), "max_steps": 1, **keys,
    }  # fmt: skip
    return make_plan(check(recipe).recipe, CARD)


LORA = {"adapter": "lora", "lora_target_linear": True, "lora_r": 4}


@cache
def known(family: str, with_images: bool = True, frozen: bool = True) -> RunPlan:
    """One of the plans that several tests look at."""
    with TemporaryDirectory() as folder:
        return planned(Path(folder), family, with_images, **LORA, freeze_mm_modules=frozen)


SLOW = pytest.mark.slow  # a plan takes some seconds
OTHERS = [pytest.param(family, marks=SLOW) for family in ("gemma3", "gemma4", "smolvlm")]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", *OTHERS])
def test_frozen_towers_hold_memory_in_passing_only(family: str) -> None:
    plan, text = known(family), known(family, with_images=False)
    assert text.images is None
    assert plan.images is not None
    assert (plan.images.rows, plan.images.images, plan.images.kept) == (4, 1.0, 0)
    assert not plan.images.why_not
    # these towers have so many numbers in a hidden state, and a token for each patch or more
    assert plan.images.passing > 4 * plan.images.tokens * 32 * 2
    assert plan.images.flops > 0
    assert plan.memory.weights == text.memory.weights  # which has the towers, too
    if family != "gemma4":  # whose peak is while the tower runs, before the logits
        assert plan.memory.activations == text.memory.activations
    assert plan.memory.peak >= text.memory.peak
    assert plan.speed.flops == text.speed.flops + plan.images.flops


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", pytest.param("gemma3", marks=SLOW), pytest.param("llava", marks=SLOW)]
)
def test_trained_towers_keep_what_backward_needs(family: str) -> None:
    plan, text = known(family, True, frozen=False), known(family, False, frozen=False)
    frozen = known(family)
    assert plan.images is not None
    assert frozen.images is not None
    kept = plan.memory.activations - text.memory.activations
    assert kept > plan.images.kept >= 0
    assert kept > 4 * plan.images.tokens * 32 * 2 * 2  # a hidden state of each of two blocks
    assert plan.trained > frozen.trained
    assert plan.speed.flops > frozen.speed.flops


def test_images_of_preferences_are_read(tmp_path: Path) -> None:
    FAMILIES["llava"].save(tmp_path / "base")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    asked = [{"role": "user", "content": "which colour?"}]
    answers = {name: [{"role": "assistant", "content": "red"}] for name in ("chosen", "rejected")}
    pair = {"images": ["image.png"], "prompt": asked, **answers}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 3)
    recipe = {
        "base_model": str(tmp_path / "base"), "rl": "dpo", "micro_batch_size": 4,
        "datasets": [{"path": str(tmp_path / "pairs.jsonl"), "type": "chat_template"}],
    }  # fmt: skip
    pairs = check(recipe).recipe
    found = row_images(pairs)
    assert found is not None
    assert (found.rows, found.images, found.tokens) == (3, 1.0, 16)
    assert found.longest == found.length > 16 + len("which colour?red")  # a byte is a token
    settings = preference_settings(pairs)
    assert settings is not None
    assert found.times(pairs, settings.sequences) == 8  # both answers of a pair have its images
    with pytest.raises(DataError, match="line 1: the row has an image, and rl: orpo trains"):
        row_images(check({**recipe, "rl": "orpo"}).recipe)


def test_larger_images_take_more(tmp_path: Path) -> None:
    small = planned(tmp_path, "qwen2_5_vl", **LORA, image_size=16)
    large = known("qwen2_5_vl")  # of 32 x 32
    assert small.images is not None
    assert large.images is not None
    assert large.images.tokens > small.images.tokens
    assert large.images.passing > 2 * small.images.passing


def test_a_pack_has_the_images_of_its_rows(tmp_path: Path) -> None:
    alone = known("qwen2_5_vl")
    packs = planned(tmp_path, "qwen2_5_vl", **LORA, sample_packing=True, sequence_len=512)
    assert alone.images is not None
    assert packs.images is not None
    assert packs.images.passing > 3 * alone.images.passing


def test_without_rows_here_an_image_is_assumed_and_it_is_said(tmp_path: Path) -> None:
    keys = {**LORA, "processor_type": "AutoProcessor", "image_size": 32}
    FAMILIES["gemma3"].save(tmp_path / "base")
    recipe = {
        "base_model": str(tmp_path / "base"), "datasets": [{"path": "some/rows"}],
        "sequence_len": 128, "micro_batch_size": 2, "codegen": "eager", "max_steps": 1, **keys,
    }  # fmt: skip
    plan = make_plan(check(recipe, with_data=False).recipe, CARD)
    assert plan.images is not None
    assert (plan.images.rows, plan.images.images) == (0, 1.0)
    console = Console(record=True, width=200)
    show(plan, console)
    assert "images: 1.00 a row, for which 10 tokens stand (ASSUMED" in console.export_text()


def test_a_plan_says_what_its_images_take() -> None:
    plan = known("llava")
    console = Console(record=True, width=200)
    show(plan, console)
    said = console.export_text()
    assert "images: 1.00 a row, for which 16 tokens stand (in the first 4 rows, of at most " in said
    assert plan.to_dict()["images"]["tokens"] == 16
    assert verdict_lines(plan)[0] in said  # as a dry run has it


def test_towers_that_cannot_be_counted_are_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(self: Any, pixel_values: Any) -> Any:
        return float(next(self.parameters()).sum())

    monkeypatch.setattr(LlavaForConditionalGeneration, "get_image_features", reads)
    plan = planned(tmp_path, "llava", **LORA)
    console = Console(record=True, width=200)
    show(plan, console)
    assert "towers are NOT COUNTED: DataDependentOutputException" in console.export_text()


def test_addresses_are_asked_with_consent(tmp_path: Path) -> None:
    """The message of ``plan`` names a switch that it has."""
    FAMILIES["qwen2_5_vl"].save(tmp_path / "base")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}]
    row = {"images": ["http://127.0.0.1:1/a.png"], "messages": turns}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {"base_model": "base", "datasets": [{"path": "rows.jsonl"}], "output_dir": "out"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["plan", tmp_path / "recipe.yaml", "--gpus", "24GB"]
    assert "pass --allow-image-urls" in fusewright(*words).stderr
    assert "a.png: cannot be downloaded" in fusewright(*words, "--allow-image-urls").stderr
