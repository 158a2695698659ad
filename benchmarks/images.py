"""Do tiny models learn to see? Drawn images, named by colour and shape, and runs without them.

    python benchmarks/images.py --families qwen2_5_vl,gemma3,llava --rows 2000 --json FILE

Each family's tiny checkpoint (random weights, tower included) is trained by an ordinary recipe on
four fifths of the images. Plain transformers then answers for the rest: with each row's image, with
the image of another row, and, after a second run on the same rows without their images, with none.
Exit status 1 unless the first is far above chance, and the others are at chance.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, describe

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220),
           "yellow": (230, 210, 30)}  # fmt: skip
ANSWERS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
CHANCE = 1 / len(ANSWERS)
QUESTION = "What is it?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and question each family."""
    options = _parse(arguments)
    sys.path.insert(0, str(ROOT))  # the tiny checkpoints are those of the tests
    results, failed = [], False
    print(f"{'family':14}{'loss':>16}{'unseen':>9}{'swapped':>9}{'no image':>10}{'seconds':>9}")
    for name in options.families.split(","):
        with tempfile.TemporaryDirectory(prefix="fusewright-bench-images-") as folder:
            found = learn(name, options.rows, options.steps, options.rate, Path(folder))
        results.append(found)
        failed |= not sees(found)
        print(f"{name:14}{found['first_loss']:>8.3f}{found['last_loss']:>8.3f}"
              f"{found['unseen']:>9.1%}{found['swapped']:>9.1%}{found['no_image']:>10.1%}"
              f"{found['seconds']:>9.0f}", flush=True)  # fmt: skip
    print(f"chance: {CHANCE:.1%}")
    if options.json:
        shared = {"rows": options.rows, "steps": options.steps, "chance": CHANCE}
        text = json.dumps([describe() | shared | found for found in results], indent=2)
        options.json.write_text(text + "\n")
    return int(failed)


def sees(found: dict[str, Any]) -> bool:
    """Whether a model answers by the image, and by nothing else."""
    deviation = math.sqrt(CHANCE * (1 - CHANCE) / found["questions"])
    at_chance = CHANCE + 4 * deviation
    return bool(
        found["unseen"] > 3 * CHANCE
        and found["last_loss"] < found["first_loss"] / 2
        and found["swapped"] < at_chance
        and found["no_image"] < at_chance
    )


def learn(name: str, rows: int, steps: int, rate: float, folder: Path) -> dict[str, Any]:
    """Train one family's tiny checkpoint with the images and without, and question both."""
    from tests.train.images.families import FAMILIES

    base = FAMILIES[name].save(folder / "base")
    images, answers = draw(folder / "images", rows)
    held = rows // 5
    start = time.monotonic()
    with_images = rows_with(images[held:], answers[held:])
    losses = _train(base, with_images, steps, rate, folder / "seeing")
    seconds = time.monotonic() - start
    _train(base, rows_with([None] * (rows - held), answers[held:]), steps, rate, folder / "blind")
    seeing = _Asked(folder / "seeing", base)
    unseen, wanted = images[:held], answers[:held]
    swapped = random.Random(1).sample(unseen, held)
    window = max(1, min(10, len(losses) // 4))
    return {
        "family": name, "questions": held, "seconds": seconds,
        "first_loss": sum(losses[:window]) / window, "last_loss": sum(losses[-window:]) / window,
        "unseen": seeing.accuracy(unseen, wanted),
        "swapped": seeing.accuracy(swapped, wanted),
        "no_image": _Asked(folder / "blind", base).accuracy([None] * held, wanted),
    }  # fmt: skip


# --- the rows -------------------------------------------------------------------------------------


def draw(folder: Path, count: int) -> tuple[list[Path], list[str]]:
    """Draw images, each answer as often as any other; their files and answers, in one order."""
    folder.mkdir(parents=True)
    drawn = random.Random(0)
    files, answers = [], [ANSWERS[i % len(ANSWERS)] for i in range(count)]
    drawn.shuffle(answers)
    for i, answer in enumerate(answers):
        files.append(folder / f"{i}.png")
        _image(answer, drawn).save(files[-1])
    return files, answers


def _image(answer: str, drawn: random.Random) -> Any:
    from PIL import Image, ImageDraw

    colour, shape = answer.split()
    image = Image.new("RGB", (SIDE, SIDE), (drawn.randrange(256),) * 3)
    size = drawn.randint(12, 24)
    x, y = drawn.randint(0, SIDE - size - 1), drawn.randint(0, SIDE - size - 1)
    fill = tuple(min(255, max(0, c + drawn.randint(-20, 20))) for c in COLOURS[colour])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse([x, y, x + size, y + size], fill=fill)
    elif shape == "square":
        pen.rectangle([x, y, x + size, y + size], fill=fill)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
    return image


def _question(image: Path | None) -> dict[str, Any]:
    if image is None:
        return {"role": "user", "content": QUESTION}
    parts = [{"type": "image", "path": str(image)}, {"type": "text", "text": QUESTION}]
    return {"role": "user", "content": parts}


def rows_with(images: Sequence[Path | None], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for chat templates that ask for each image, or for none, and answer."""
    return [
        {"messages": [_question(image), {"role": "assistant", "content": answer}]}
        for image, answer in zip(images, answers, strict=True)
    ]


# --- the run, and the answers ---------------------------------------------------------------------


def _train(
    base: Path, rows: list[dict[str, Any]], steps: int, rate: float, output: Path
) -> list[float]:
    """Train all weights by a recipe; the loss of each step."""
    from rich.console import Console

    from fusewright.train import train

    file = output.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "base_model": str(base), "output_dir": str(output),
        "datasets": [{"path": str(file), "type": "chat_template",
                      "images_dir": str(output.parent / "images")}],
        "freeze_mm_modules": False, "bf16": False, "codegen": "eager", "seed": 0,
        "sequence_len": 128, "micro_batch_size": 32, "max_steps": steps, "learning_rate": rate,
        "lr_scheduler": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0, "logging_steps": 1,
    }  # fmt: skip
    with (output.parent / f"{output.name}.log").open("w", encoding="utf-8") as log:
        result = train(recipe, console=Console(file=log, width=200))
    if result.status != "finished" or result.problems:
        raise RuntimeError(f"{result.status}: {result.problems}")
    return [entry["loss"] for entry in result.history if "loss" in entry]


class _Asked:
    """A saved model, as plain transformers loads and questions it."""

    def __init__(self, folder: Path, base: Path) -> None:
        import torch
        import transformers

        auto = transformers.AutoModelForImageTextToText
        self.model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(base)
        self.processor.tokenizer.padding_side = "left"

    def accuracy(
        self, images: Sequence[Path | None], wanted: Sequence[str], size: int = 50
    ) -> float:
        """How many of the questions get the wanted answer, of all."""
        right = 0
        for begin in range(0, len(wanted), size):
            said = self._answers(images[begin : begin + size])
            right += sum(a == b for a, b in zip(said, wanted[begin : begin + size], strict=True))
        return right / len(wanted)

    def _answers(self, files: Sequence[Path | None]) -> list[str]:
        import torch
        from PIL import Image

        texts = [
            self.processor.apply_chat_template(
                [_bare(file)], tokenize=False, add_generation_prompt=True
            )
            for file in files
        ]
        images = [[Image.open(file).convert("RGB")] for file in files if file is not None]
        inputs = self.processor(
            text=texts, images=images or None, padding=True, add_special_tokens=False,
            return_tensors="pt",
        )  # fmt: skip
        longest = max(map(len, ANSWERS)) + 1  # of bytes, each of which is a token
        with torch.no_grad():
            made = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        decoded = self.processor.tokenizer.batch_decode(made[:, prompt:])
        return [match[0] if (match := re.match(r"[a-z ]+", text)) else "" for text in decoded]


def _bare(file: Path | None) -> dict[str, Any]:
    """A question as a template has it: with a placeholder, and no path."""
    question = _question(file)
    if file is not None:
        question["content"][0] = {"type": "image"}
    return question


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="qwen2_5_vl,gemma3,llava")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
