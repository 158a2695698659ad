"""Rows with drawn images, and recipes that train tiny checkpoints on them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fusewright.train.data import Packs, PreparedData, Sample, collate, pack, prepare
from fusewright.train.data.images.features import Featurizer
from fusewright.train.model.processor import load_processing
from fusewright.train.processing import Processing
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.build import featurizer_for

from .families import FAMILIES

COLOURS = ("red", "green", "blue", "black")


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="fusewright-images-")


@cache
def checkpoint(family: str) -> Path:
    """The folder of a tiny checkpoint; made once."""
    return FAMILIES[family].save(Path(_folder().name, family))


def drawn(path: Path, rng: random.Random) -> str:
    """Draw a rectangle on an image of some size; returns its colour."""
    image = Image.new("RGB", (rng.choice([24, 32, 40]), rng.choice([24, 32, 48])), "white")
    colour = rng.choice(COLOURS)
    place = [rng.randint(0, 8), rng.randint(0, 8), rng.randint(12, 20), rng.randint(12, 20)]
    ImageDraw.Draw(image).rectangle(place, fill=colour)
    image.save(path)
    return colour


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(folder: Path, count: int = 12, kinds: str = "1t2") -> Path:
    """Rows of the kinds in turn: one image, text alone, two images in two turns."""
    rng, rows = random.Random(0), []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if kind == "t":
            rows.append({"messages": [turn("user", f"say {i}"), turn("assistant", f"it is {i}")]})
            continue
        names = [f"{i}-{k}.png" for k in range(int(kind))]
        colours = [drawn(folder / name, rng) for name in names]
        messages = [turn("user", "<image> colour?"), turn("assistant", colours[0])]
        if kind == "2":
            messages += [turn("user", "and <image> this?"), turn("assistant", f"a {colours[1]}")]
        rows.append({"messages": messages, "images": names})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small(family: str, rows: Path, output: Path, **keys: Any) -> dict[str, Any]:
    """Four steps of LoRA."""
    return {
        "base_model": str(checkpoint(family)), "output_dir": str(output), "bf16": False,
        "datasets": [{"path": str(rows), "type": "chat_template"}], "sequence_len": 512,
        "adapter": "lora", "lora_r": 4, "lora_target_linear": True, "learning_rate": 1e-2,
        "micro_batch_size": 2, "max_steps": 4, "val_set_size": 0, "optimize": False,
        "audit": False, "logging_steps": 1, "save_total_limit": 8, **keys,
    }  # fmt: skip


@dataclass
class Rows:
    """The prepared rows of a recipe, and what makes batches of them."""

    recipe: Recipe
    processing: Processing
    prepared: PreparedData

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Rows:
        recipe = Recipe.model_validate(keys)
        processing = load_processing(recipe)
        return cls(recipe, processing, prepare(recipe, processing))

    @property
    def samples(self) -> list[Sample]:
        return list(self.prepared.train)  # type: ignore[arg-type]

    @property
    def pad(self) -> int:
        return int(self.processing.tokenizer.pad_token_id)

    def featurizer(self, model: Any) -> Featurizer:
        made = featurizer_for(model, self.recipe, self.processing, self.prepared.has_extra())
        assert made is not None
        return made

    def batch(
        self, model: Any, packs: Sequence[Sequence[Sample]], packing: bool
    ) -> dict[str, Tensor]:
        """As it is trained."""
        made = collate(packs, self.pad, packing, self.recipe.sequence_len)
        return {**made, **self.featurizer(model).features(packs, made)}

    def packed(self, length: int) -> list[list[Sample]]:
        """The samples in as few rows of so many tokens as they fit in."""
        samples = self.samples
        return list(Packs(samples, pack([len(s.input_ids) for s in samples], length)))


def summed(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of the losses of a batch's trained tokens."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def gradients(model: Any) -> dict[str, Tensor]:
    """Those that there are, which the model then has no more."""
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
