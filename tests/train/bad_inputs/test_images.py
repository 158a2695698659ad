"""Rows with images: files that are missing, damaged or of the wrong kind, and rows that lie."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ..commands import fusewright, snapshot
from ..conftest import make_model, make_tokenizer
from ..images.families import FAMILIES
from ..methods.teacher import TYPE
from .box import ROW, Bad, Box, Make, check

_RED = (200, 30, 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that reads images."""
    return FAMILIES["qwen2_5_vl"].save(tmp_path_factory.mktemp("vision"))


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 32)) -> bytes:
    """The file of a plain image."""
    buffer = io.BytesIO()
    Image.new(mode, size, _RED[: len(mode)] if mode == "RGB" else 0).save(buffer, kind)
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "green")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (24, 24), 40_000).save(buffer, "PNG")
    return buffer.getvalue()


def a_png(width: int, height: int, bits: int = 8, pixels: bytes = b"\0" * 1000) -> bytes:
    """A PNG in RGB that says that it is so large, whatever it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + content + chunk(b"IEND", b"")


def asked(text: str = "<image>What?", answer: str = "Red.", **fields: Any) -> dict[str, Any]:
    """A row with a question and its answer."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def second(
    row: dict[str, Any], files: dict[str, bytes] | None = None, first: str = ROW, **keys: Any
) -> Make:
    """Training on a good row and then this one, with these files beside them."""

    def make(box: Box) -> list[str]:
        box.write("good.png", encoded())
        for name, content in (files or {}).items():
            box.write(name, content)
        path = box.rows(f"{first}\n{json.dumps(row)}\n", "data/rows.jsonl")
        for name in ["good.png", *(files or {})]:
            shutil.move(box.folder / name, box.folder / "data" / name)
        return box.recipe(datasets=[{"path": str(path), **keys}], val_set_size=0)

    return make


def with_file(content: bytes, name: str = "bad.png") -> Make:
    """Training on a row whose image has this content."""
    return second(asked(images=[name]), {name: content})


def with_parts(*parts: dict[str, Any]) -> Make:
    """Training on a row whose question is of these parts."""
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Red."}]
    return second({"messages": turns})


def a_folder(box: Box) -> list[str]:
    (box.folder / "data" / "folder.png").mkdir(parents=True)
    return second(asked(images=["folder.png"]))(box)


def a_pipe(box: Box) -> list[str]:
    (box.folder / "data").mkdir()
    os.mkfifo(box.folder / "data" / "pipe.png")
    return second(asked(images=["pipe.png"]))(box)


def a_link(box: Box) -> list[str]:
    box.write("secret.png", encoded())
    (box.folder / "data").mkdir()
    (box.folder / "data" / "link.png").symlink_to("../secret.png")
    return second(asked(images=["link.png"]))(box)


def an_absolute_path(box: Box) -> list[str]:
    outside = box.write("secret.png", encoded())
    return second(asked(images=[str(outside)]))(box)


def no_processor(box: Box) -> list[str]:
    model = box.model()
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink(missing_ok=True)
    (model / "video_preprocessor_config.json").unlink(missing_ok=True)
    words = second(asked(images=["good.png"]))(box)
    return [*words, "--base_model", str(model)]


def text_model(box: Box) -> list[str]:
    make_model().save_pretrained(box.folder / "text")
    make_tokenizer().save_pretrained(box.folder / "text")
    words = second(asked(images=["good.png"]))(box)
    return [*words, "--base_model", str(box.folder / "text")]


def a_student(box: Box) -> list[str]:
    row = asked(images=["good.png"], logprobs=[[{"token": "token_id:5", "logprob": -0.5}]])
    words = second(row, type=TYPE)(box)
    path = box.folder / "data" / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return [*words, "--kd_trainer", "true"]


WHERE = "rows.jsonl, line 2: image 1"
CASES = {
    "no file": Bad(
        second(asked(images=["no.png"])), f"{WHERE}: ", "no.png: file not found; relative paths"
    ),
    "noise with a PNG's first bytes": Bad(
        with_file(b"\x89PNG\r\n\x1a\n" + bytes(range(200))), WHERE, "bad.png: is"
    ),
    "a text": Bad(with_file(b"a text, not an image"), WHERE, "save it as PNG or JPEG"),
    "an empty file": Bad(with_file(b""), WHERE, "is empty: save it anew, or leave the row out"),
    "a bomb": Bad(with_file(a_png(60_000, 60_000)), WHERE, "far too many pixels: make it"),
    "too many pixels": Bad(
        with_file(a_png(12_000, 10_000)), WHERE, "12000 x 10000 pixels, more than 100 million"
    ),
    "an animation": Bad(with_file(animated()), WHERE, "animated (3 frames): save the one"),
    "the colours of print": Bad(with_file(encoded("JPEG", "CMYK")), WHERE, "convert it to RGB"),
    "16 bits": Bad(with_file(sixteen_bits()), WHERE, "scale it to 8 bits"),
    "16 bits a colour": Bad(
        with_file(a_png(24, 24, 16, (b"\0" + b"\1\2" * 72) * 24)), WHERE,
        "8 bits a channel (mode RGB;16B), which would be cut off: scale it to 8 bits",
    ),
    "cut off": Bad(
        with_file(encoded("JPEG", size=(200, 200))[:-400]), WHERE, "damaged or cut off"
    ),
    "cut off at the end of a PNG": Bad(
        with_file(encoded(size=(200, 200))[:-40]), WHERE, "): copy it again"
    ),
    "a drawing": Bad(
        with_file(encoded("EPS"), "bad.eps"), WHERE, "is a drawing (EPS): save it as PNG"
    ),
    "a folder": Bad(a_folder, WHERE, "folder.png: is a folder; relative paths begin in"),
    "a pipe": Bad(a_pipe, WHERE, "pipe.png: is a pipe or a device"),
    "an empty path": Bad(second(asked(images=[""])), "line 2", "the path is empty"),
    "a path that is none": Bad(
        second(asked(images=["a/" * 5000 + ".png"])), WHERE, "this is not a path"
    ),
    "bad base64": Bad(
        with_parts({"type": "image", "base64": "iVBOR$$$"}), WHERE, "is not base64"
    ),
    "bad base64 in a data URL": Bad(
        with_parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,abc"}}),
        WHERE, "is not base64",
    ),
    "base64 of something else": Bad(
        with_parts({"type": "image", "base64": base64.b64encode(b"text" * 9).decode()}),
        f"{WHERE}: the image in the row", "save it as PNG or JPEG",
    ),
    "an address": Bad(
        with_parts({"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}),
        f"{WHERE}: https://x.test/a.png", "pass --allow-image-urls, or save them",
    ),
    "a path that leads up": Bad(
        second(asked(images=["../out/a.png"])), f"{WHERE}: ../out/a.png", "with images_dir"
    ),
    "a link that leads out": Bad(a_link, f"{WHERE}: link.png: leads out of", "with images_dir"),
    "a path from the root": Bad(an_absolute_path, "secret.png: leads out of", "with images_dir"),
    "a place too much": Bad(
        second(asked("<image><image>What?", images=["good.png"])),
        "line 2: the row has 1 image, and its messages have 2 places", "add what is missing",
    ),
    "an image too much": Bad(
        second(asked(images=["good.png", "good.png"])),
        "line 2: the row has 2 images, and its messages have 1 place for", "remove what is too",
    ),
    "a place without a list": Bad(
        with_parts({"type": "image"}, {"type": "text", "text": "What?"}),
        "line 2: the row has no images, and its messages have 1 place", "add what is missing",
    ),
    "a list of another name": Bad(
        second(asked("<image>What?") | {"image_path": "good.png"}),
        "line 2: a message has <image>, and the row's field 'image_path'", "name it 'images'",
    ),
    "a file in a field of another name": Bad(
        second(asked("What?") | {"photo": "good.png"}),
        "line 2: the row's field 'photo', which seems to hold an image, is not read",
        "name it 'images', or remove it",
    ),
    "an empty list": Bad(
        second(asked(images=[])), "line 2: the row has no images", "have 1 place for them"
    ),
    "null in a list": Bad(
        second(asked(images=[None])), "line 2: image 1 of 'images' is null", "leave the row out"
    ),
    "two fields": Bad(
        second(asked(images=["good.png"], image="good.png")),
        "line 2: the row has both 'images' and 'image'", "remove one of them",
    ),
    "a typed placeholder beside an image": Bad(
        second(asked("<image>What is <|image_pad|>?", images=["good.png"])),
        "line 2: the row has 1 image, and the conversation", "remove it from texts",
    ),
    "a typed placeholder": Bad(
        second(asked("What is <|image_pad|>?")),
        "line 2: a text of the row has '<|image_pad|>' in it", "remove it, or spell it otherwise",
    ),
    "a typed placeholder in an answer": Bad(
        second(asked("What?", "<|image_pad|>")), "line 2: a text of the row has", "remove it"
    ),
    "a typed placeholder of a video": Bad(
        second(asked("<image>What is <|video_pad|>?", images=["good.png"])),
        "line 2: a text of the row has '<|video_pad|>'", "remove it",
    ),
    "a placeholder in plain text": Bad(
        second({"text": "a <|image_pad|> b"}, first='{"text": "a"}', type="completion"),
        "line 2", "'<|image_pad|>' in it",
    ),
    "no processor": Bad(no_processor, "rows.jsonl, line 2: the row has an image, and", "processor"),
    "a model of texts": Bad(
        text_model, "line 2: the row has an image, and the model reads text only", "leave images"
    ),
    "a video in a part": Bad(
        with_parts({"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}),
        "line 2: message 1 has a part of type 'video'", "save frames of it as images",
    ),
    "a list as a type": Bad(
        with_parts({"type": ["text"], "text": "What?"}), "message 1 has a part of type", "'content'"
    ),
    "a column of sound": Bad(
        second(asked("What?", audio="a.wav")), "line 2: the row has 'audio'", "leave such rows out"
    ),
    "a number": Bad(second(asked(images=[5])), f"{WHERE}: must be a path", "not a int"),
    "an object without a path": Bad(
        second(asked(images=[{"file": "good.png"}])), f"{WHERE}: has none of the fields", "'file'"
    ),
    "a line of pixels": Bad(
        with_file(encoded(size=(1, 400))), "line 2: ", "cannot place an image of 1 x 400 pixels"
    ),
    "an instruction": Bad(
        second(
            {"instruction": "What?", "output": "Red.", "images": ["good.png"]},
            first='{"instruction": "What?", "output": "Red."}', type="alpaca",
        ),
        "line 2: the row has 'images'", "set type: alpaca.chat_template for instructions",
    ),
    "with a teacher": Bad(
        a_student, "line 1: the row has an image", "kd_trainer distils text only"
    ),
    "longer than sequence_len": Bad(
        lambda box: [*second(asked(images=["good.png"]))(box), "--sequence_len", "8"],
        "longer than 8 tokens", "raise sequence_len",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_images_are_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("package", ["PIL", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_a_missing_package_is_named(package: str, box: Box, tmp_path: Path) -> None:
    """In a process of its own: what is imported stays."""
    import subprocess

    words = second(asked(images=["good.png"]))(box)
    before = snapshot(box.folder)
    program = "import sys\nfrom fusewright.cli.main import main\nsys.exit(main())"
    environment = {**os.environ, "HIDDEN_PACKAGES": package}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", f"import tests.tools.hidden_packages\n{program}", *words],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "rows.jsonl, line 2: the row has an image" in message
    assert 'pip install "fusewright[images]"' in message
    assert snapshot(box.folder) == before


def prepared(box: Box, content: bytes) -> list[str]:
    """The words that prepare a row with this image in a folder that is kept."""
    words = with_file(content)(box)
    return [*words[1:], "--dataset_prepared_path", str(box.folder / "prepared")]


def test_a_long_row_is_dropped_and_counted(box: Box) -> None:
    words = with_file(encoded(size=(400, 400)))(box)
    length = 40  # the text of both has fewer tokens, and the second has 16 for its image
    done = fusewright(
        "preprocess", *words[1:], "--sequence_len", str(length),
        "--excess_length_strategy", "truncate",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    words = [line.split() for line in done.stdout.splitlines()]
    table = {" ".join(line[:-1]): line[-1] for line in words if line}
    assert table["too long"] == "1"
    assert "truncated" not in table  # a row of zeros
    assert table["train samples"] == "1"


def test_an_image_that_changes_is_prepared_anew(box: Box) -> None:
    words = prepared(box, encoded(size=(24, 24)))
    assert fusewright("preprocess", *words).exit_code == 0
    (arrow,) = (box.folder / "prepared").rglob("train.arrow")
    first = arrow.read_bytes()
    image = box.folder / "data" / "bad.png"
    os.utime(image, (1, 1))  # the same content
    assert fusewright("preprocess", *words).exit_code == 0
    assert arrow.read_bytes() == first
    image.write_bytes(encoded(size=(32, 32)))
    assert fusewright("preprocess", *words).exit_code == 0
    assert arrow.read_bytes() != first


def test_an_image_that_is_damaged_later_loses_no_rows(box: Box) -> None:
    words = prepared(box, encoded())
    assert fusewright("preprocess", *words).exit_code == 0
    image = box.folder / "data" / "bad.png"
    image.write_bytes(b"")
    before = snapshot(box.folder)
    done = fusewright("train", *words)
    assert done.exit_code == 2
    assert "rows.jsonl, line 2: image 1" in done.stderr
    assert "is empty" in done.stderr
    assert snapshot(box.folder) == before


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.long)])
def test_an_image_that_changes_while_training_is_refused(
    workers: str, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between preparation and the batch, which a process of the loader may make."""
    from fusewright.train.trainer import build

    words = [*prepared(box, encoded()), "--sample_packing", "false"]
    words += ["--dataloader_num_workers", workers]
    image = box.folder / "data" / "bad.png"
    make = build.featurizer_for

    def later(*arguments: Any) -> Any:
        image.write_bytes(encoded(size=(32, 32)))
        return make(*arguments)

    monkeypatch.setattr(build, "featurizer_for", later)
    done = fusewright("train", *words)
    assert done.exit_code == 2, done.output
    assert "bad.png: has changed since its row was prepared" in done.stderr
    assert "put it back, or begin a new run" in done.stderr
    assert "Traceback" not in done.stderr
