"""Starter recipes for rows with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from fusewright.train import train

from ..commands import fusewright, refused
from ..images.families import FAMILIES


def write(folder: Path, images: Path | None = None) -> Path:
    """Rows with images, of both forms, and one in six of text alone."""
    lines = []
    images = images or folder
    images.mkdir(exist_ok=True)
    for i in range(60):
        name = f"{i % 3}.png"
        if i < 3:
            Image.new("RGB", (32, 32), ("red", "green", "blue")[i]).save(images / name)
        asked: Any = [{"type": "image", "path": name}, {"type": "text", "text": "which colour?"}]
        if i % 6 == 5:
            asked = "say something"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    file = folder / "rows.jsonl"
    file.write_text("".join(lines))
    return file


@pytest.mark.long("llava-images")
@pytest.mark.parametrize(
    ("family", "images"),
    [
        ("qwen2_5_vl", None),
        ("llava", "images"),
        pytest.param("gemma3", None, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_for_images_trains(family: str, images: str | None, tmp_path: Path) -> None:
    """Images are beside the rows, or in a folder of their own."""
    folder = tmp_path / images if images else None
    rows, model = write(tmp_path, folder), FAMILIES[family].save(tmp_path / "model")
    options = ["--images-dir", str(folder)] if folder else []
    result = fusewright("init", str(rows), "--model", str(model), *options)
    assert result.exit_code == 0, result.output
    assert "50 rows have images" in " ".join(result.stdout.replace("#", "").split())
    found: dict[str, Any] = yaml.safe_load(result.stdout)
    assert found["datasets"][0]["type"] == "chat_template"
    assert found["datasets"][0].get("images_dir") == (str(folder) if folder else None)
    made = train(
        found, console=Console(quiet=True), max_steps=2, codegen="eager",
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert (made.status, made.steps, made.problems) == ("finished", 2, [])


def test_a_model_for_text_is_not_proposed_for_images(model: Path, tmp_path: Path) -> None:
    message = refused("init", str(write(tmp_path)), "--model", str(model))
    assert "rows.jsonl, line 1: the row has an image, and the model reads text only" in message
    assert "choose one with --model, such as HuggingFaceTB/SmolVLM-256M-Instruct" in message
