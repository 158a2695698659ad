"""Rows with images as Axolotl, TRL, LLaMA-Factory and LLaVA write them: all the same in the end."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fusewright.errors import DataError
from fusewright.train.data import prepare
from fusewright.train.data.formats.conversation import Conversation
from fusewright.train.data.images.features import Illustrated
from fusewright.train.data.images.picture import Gallery, Resizing, load
from fusewright.train.recipe.recipe import Dataset, Recipe

from ..conftest import write_rows
from .rows import draw, processor_of

QUESTION, ANSWER = "What colour?", "Red."


def turns(content: Any, answer: Any = ANSWER) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def parts(image: dict[str, Any]) -> list[dict[str, Any]]:
    """A question in parts, the image first."""
    return [image, {"type": "text", "text": QUESTION}]


def encoded() -> str:
    return base64.b64encode(Path("a.png").read_bytes()).decode()


def opened() -> Any:
    return Image.open("a.png")


ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a part with a path": (
        lambda: {"messages": turns(parts({"type": "image", "path": "a.png"}))}, {},
    ),
    "a part with an image's path": (
        lambda: {"messages": turns(parts({"type": "image", "image": "a.png"}))}, {},
    ),
    "a part with a URL of a file": (
        lambda: {"messages": turns(parts({"type": "image", "url": Path("a.png").absolute().as_uri()}
        ))}, {},
    ),
    "a part with base64": (
        lambda: {"messages": turns(parts({"type": "image", "base64": encoded()}))}, {},
    ),
    "a part of OpenAI's": (
        lambda: {"messages": turns(parts(
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded()}"}}
        ))}, {},
    ),
    "a part of Qwen's": (
        lambda: {"messages": turns(parts(
            {"type": "image", "image": f"data:image;base64,{encoded()}"}
        ))}, {},
    ),
    "a part without a type": (lambda: {"messages": turns(parts({"image": "a.png"}))}, {}),
    "answers in parts": (
        lambda: {"messages": turns(
            parts({"type": "image", "path": "a.png"}), [{"type": "text", "text": ANSWER}]
        )}, {},
    ),
    "open parts and a list": (
        lambda: {"messages": turns(parts({"type": "image"})), "images": ["a.png"]}, {},
    ),
    "open parts and an image": (
        lambda: {"messages": turns(parts({"type": "image"})), "image": "a.png"}, {},
    ),
    "TRL's list without places": (
        lambda: {"messages": turns(QUESTION), "images": [opened()]}, {},
    ),
    "TRL's prompt and completion": (
        lambda: {
            "prompt": [{"role": "user", "content": parts({"type": "image"})}],
            "completion": [{"role": "assistant", "content": ANSWER}], "images": [opened()],
        },
        {"type": "prompt_completion"},
    ),
    "a table's bytes": (
        lambda: {
            "messages": turns(QUESTION),
            "images": [{"bytes": Path("a.png").read_bytes(), "path": None}],
        }, {},
    ),
    "a table's path": (
        lambda: {"messages": turns(QUESTION), "image": {"bytes": None, "path": "a.png"}}, {},
    ),
    "bare base64": (lambda: {"messages": turns(QUESTION), "image": encoded()}, {}),
    "LLaMA-Factory's marks": (
        lambda: {
            "conversations": [
                {"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": ANSWER},
            ],
            "images": ["a.png"],
        },
        {"field_messages": "conversations"},
    ),
    "LLaMA-Factory's instruction": (
        lambda: {
            "instruction": f"<image>{QUESTION}", "input": "", "output": ANSWER, "images": ["a.png"],
        },
        {"type": "alpaca.chat_template"},
    ),
    "LLaVA's image": (
        lambda: {
            "conversations": [
                {"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": ANSWER},
            ],
            "image": "a.png",
        },
        {"field_messages": "conversations"},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path)
    monkeypatch.chdir(tmp_path)


def samples(path: Path, dataset: dict[str, Any] | None = None, **keys: Any) -> list[Any]:
    """The prepared samples of a file of rows."""
    described = {"path": str(path), "type": "chat_template", **(dataset or {})}
    kept = str(path.parent / "prepared")  # with the images that rows hold
    recipe = Recipe(
        base_model="x", datasets=[described], sequence_len=512, dataset_prepared_path=kept, **keys
    )  # fmt: skip
    return list(prepare(recipe, processor_of("qwen2_5_vl")).train)


def seen(sample: Any) -> list[Any]:
    """The images of a sample, as the processor gets them."""
    illustrated = Illustrated.of(sample)
    assert illustrated is not None
    return [np.asarray(load(p, Resizing(), "")) for p in illustrated.pictures]


def plain(value: Any) -> Any:
    """A row as JSON can hold it; PIL's images as in a table of the datasets library."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        value = buffer.getvalue()
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_others(name: str, tmp_path: Path) -> None:
    make, keys = ROWS[name]
    (usual,) = samples(write_rows(tmp_path / "usual.jsonl", [ROWS["a part with a path"][0]()]))
    (sample,) = samples(write_rows(tmp_path / "rows.jsonl", [plain(make())]), keys)
    assert sample.input_ids == usual.input_ids
    assert sample.labels == usual.labels
    (image,) = seen(sample)
    assert np.array_equal(image, np.asarray(opened().convert("RGB")))


@pytest.mark.parametrize("name", ["TRL's list without places", "a table's bytes"])
def test_objects_that_only_tables_hold(name: str, tmp_path: Path) -> None:
    """Bytes, and PIL's images, which JSON has not."""
    conversation = Conversation(Dataset(path="x"), "", None, Gallery(tmp_path, tmp_path / "copies"))
    chat = conversation.read(ROWS[name][0](), "rows, row 1")
    (picture,) = chat.pictures
    assert Path(picture.path).parent == tmp_path / "copies"
    assert chat.messages[0]["content"] == parts({"type": "image"})


def test_images_of_several_turns_keep_their_order(tmp_path: Path) -> None:
    row = {
        "messages": [
            *turns("<image> and <image>?"), *turns([{"type": "text", "text": "And<image>?"}]),
        ],
        "images": ["b.png", "a.png", "c.png"],
    }  # fmt: skip
    (sample,) = samples(write_rows(tmp_path / "rows.jsonl", [row]))
    sizes = [image.shape[:2] for image in seen(sample)]
    assert sizes == [(24, 48), (32, 24), (40, 40)]


def test_a_part_with_its_own_path_takes_none_of_the_list(tmp_path: Path) -> None:
    content = [
        {"type": "image"}, {"type": "image", "path": "c.png"}, {"type": "text", "text": "?"},
        {"type": "image"},
    ]  # fmt: skip
    row = {"messages": turns(content), "images": ["a.png", "b.png"]}
    (sample,) = samples(write_rows(tmp_path / "rows.jsonl", [row]))
    assert [i.shape[:2] for i in seen(sample)] == [(32, 24), (40, 40), (24, 48)]


def test_a_mark_without_images_is_text(tmp_path: Path) -> None:
    """Of a row that has no field for them: it may be about HTML."""
    (sample,) = samples(write_rows(tmp_path / "rows.jsonl", [{"messages": turns("<image>?")}]))
    assert Illustrated.of(sample) is None
    words = processor_of("qwen2_5_vl").tokenizer
    assert "<image>?" in words.decode(sample.input_ids)


def table() -> list[dict[str, Any]]:
    content = Path("a.png").read_bytes()
    other = Path("b.png").read_bytes()
    answer = [{"type": "text", "text": ANSWER}]
    shown = turns(parts({"type": "image"}), answer)
    return [
        {"messages": shown, "images": [{"bytes": content, "path": None}]},
        {"messages": turns([{"type": "text", "text": "Hi"}], answer), "images": None},
        {"messages": shown, "images": [{"bytes": other, "path": "gone.png"}]},
    ]


def test_a_table_of_bytes(tmp_path: Path) -> None:
    """Arrow fills in nulls for what other rows have; each content is kept once."""
    rows = [*table(), table()[0]]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    kept = tmp_path / "prepared"
    found = samples(tmp_path / "rows.parquet")
    assert [Illustrated.of(sample) is None for sample in found].count(True) == 1
    names = sorted(p.name for p in (kept / "images").iterdir())
    digests = {p.digest for s in found if (i := Illustrated.of(s)) for p in i.pictures}
    assert names == sorted(digests)
    assert len(names) == 2


def test_bytes_in_a_field_of_another_name(tmp_path: Path) -> None:
    """Whether their file is there or not; a text that only looks like a file's name is one."""
    rows = [{k if k != "images" else "picture": v for k, v in row.items()} for row in table()]
    parquet.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="the row's field 'picture', which seems to hold an image"):
        samples(tmp_path / "rows.parquet")
    row = {"messages": turns("Hi"), "source": "scan-7.png", "tags": ["https://x.test/a.png"]}
    assert len(samples(write_rows(tmp_path / "texts.jsonl", [row]))) == 1


def test_a_table_of_the_datasets_library(tmp_path: Path) -> None:
    """Its images are not opened before the encoder does it: the file's own bytes are kept."""
    import datasets

    rows = [{"messages": turns(QUESTION), "images": ["a.png"]},
            {"messages": turns(QUESTION), "images": ["b.png"]}]  # fmt: skip
    made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    made = made.map(lambda row: row)  # embeds nothing: the files stay where they are
    made.save_to_disk(str(tmp_path / "saved"))
    found = samples(tmp_path / "saved", {"images_dir": str(tmp_path)})
    originals = {Path(name).read_bytes() for name in ("a.png", "b.png")}
    paths = [p.path for s in found if (i := Illustrated.of(s)) for p in i.pictures]
    assert {Path(path).read_bytes() for path in paths} == originals


def test_addresses_are_asked_with_consent_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> Any:
        asked.append(url)
        return io.BytesIO(Path("a.png").read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    value = {"url": "https://x.test/a.png"}
    refusing = Gallery(tmp_path, tmp_path / "copies")
    with pytest.raises(DataError, match="--allow-image-urls"):
        refusing.picture(value, "rows, row 1")
    assert asked == []
    allowing = Gallery(tmp_path, tmp_path / "copies", may_download=True)
    picture = allowing.picture(value, "rows, row 1")
    assert asked == ["https://x.test/a.png"]
    assert Path(picture.path).read_bytes() == Path("a.png").read_bytes()


def test_rows_of_the_hub_name_no_files_here(tmp_path: Path) -> None:
    gallery = Gallery(Path("somebody/rows"), tmp_path / "copies")
    with pytest.raises(DataError, match=r"a\.png: rows of the hub .* name it with images_dir"):
        gallery.picture("a.png", "somebody/rows, row 1: image 1")
    content = base64.b64encode(Path("a.png").read_bytes()).decode()
    assert gallery.picture({"base64": content}, "row 1").size == (24, 32)


def test_an_address_with_a_space_is_refused_in_a_line(tmp_path: Path) -> None:
    """Before anything is asked: http.client has errors that are neither OSError nor ValueError."""
    gallery = Gallery(tmp_path, tmp_path / "copies", may_download=True)
    with pytest.raises(DataError, match=r"row 1: http://localhost/a b\.png: cannot"):
        gallery.picture({"url": "http://localhost/a b.png"}, "rows, row 1")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_several_processes_read_images(processes: int, tmp_path: Path) -> None:
    rows = [ROWS["a part with a path"][0](), {"messages": turns("Hi")}] * 600
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = samples(path, dataset_processes=processes, shuffle_merged_datasets=False)
    assert len(found) == 1200
    assert [bool(sample.extra) for sample in found] == [True, False] * 600


def test_a_stream_has_its_images(tmp_path: Path) -> None:
    rows = [ROWS["a part with a path"][0](), {"messages": turns("Hi")}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = Recipe(
        base_model="x", datasets=[{"path": str(path), "type": "chat_template"}], streaming=True,
        val_set_size=0, max_steps=2, streaming_multipack_buffer_size=2, sequence_len=512,
    )  # fmt: skip
    stream = prepare(recipe, processor_of("qwen2_5_vl")).train
    packs = list(islice(stream, 2))
    assert sorted(bool(sample.extra) for pack in packs for sample in pack) == [False, True]


def test_equal_rows_are_duplicates_wherever_they_are(tmp_path: Path) -> None:
    row = ROWS["a part with a path"][0]()
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    copy = {"messages": turns(parts({"type": "image", "path": "d.png"}))}
    other = {"messages": turns(parts({"type": "image", "path": "c.png"}))}
    Image.new("RGB", (24, 32), "green").save(tmp_path / "e.png")  # as large, with other pixels
    green = {"messages": turns(parts({"type": "image", "path": "e.png"}))}
    path = write_rows(
        tmp_path / "rows.jsonl", [row, copy, other, green, json.loads(json.dumps(row))]
    )
    found = samples(path, dataset_exact_deduplication=True)
    assert len(found) == 3


def test_texts_alone_for_a_model_that_reads_images(tmp_path: Path) -> None:
    """In batches of their own, before and behind one with images."""
    text, shown = {"messages": turns("Hi")}, ROWS["a part with a path"][0]()
    path = write_rows(tmp_path / "rows.jsonl", [text] * 512 + [shown] + [text] * 1023)
    found = samples(path, shuffle_merged_datasets=False)
    assert [i for i, sample in enumerate(found) if sample.extra] == [512]
    only = samples(write_rows(tmp_path / "text.jsonl", [text] * 3))
    assert [sample.extra for sample in only] == [""] * 3


def test_the_hash_of_the_rows_is_also_that_of_their_images(tmp_path: Path) -> None:
    """A run that goes on with other images would not be the same."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["a part with a path"][0]()])
    recipe = Recipe(base_model="x", datasets=[{"path": str(path), "type": "chat_template"}])
    first = prepare(recipe, processor_of("qwen2_5_vl")).fingerprint
    assert prepare(recipe, processor_of("qwen2_5_vl")).fingerprint == first
    Image.new("RGB", (24, 32), "green").save(tmp_path / "a.png")
    assert prepare(recipe, processor_of("qwen2_5_vl")).fingerprint != first
