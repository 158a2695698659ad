"""A few rows in the format that a recipe's dataset has."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ...train.preferences.public_rows import ROWS as PUBLIC
from ...train.preferences.public_rows import question, right

COUNT = 40


def rows_of(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a dataset of a recipe, a few of them longer; raises a KeyError for an unknown type.

    Rows of preferences are those that the public dataset of its name has.
    """
    name, kind = str(dataset.get("path")), str(dataset.get("type") or "chat_template")
    if name in PUBLIC:
        return [PUBLIC[name](i) for i in range(COUNT)]
    if name in _OF_MEDIA:
        return [_OF_MEDIA[name](i) for i in range(COUNT)]
    family = kind.removesuffix(".default").partition(":")[0]
    return [_SUPERVISED[family](dataset, i) for i in range(COUNT)]


def _answer(i: int) -> str:
    return " ".join([right(i)] * (1 + i % 4))


def _chat(dataset: Mapping[str, Any], i: int) -> dict[str, Any]:
    names = {
        "role": "role",
        "content": "content",
        **(dataset.get("message_property_mappings") or {}),
    }
    names["role"] = dataset.get("message_field_role") or names["role"]
    names["content"] = dataset.get("message_field_content") or names["content"]
    turns = [("user", question(i)), ("assistant", _answer(i))]
    if i % 5 == 0:
        turns = [("user", "Hello."), ("assistant", "Hello! How can I help?"), *turns]
    if dataset.get("drop_system_message") and i % 3 == 0:
        turns = [("system", "You count."), *turns]
    messages = [{names["role"]: role, names["content"]: text} for role, text in turns]
    if thinking := dataset.get("field_thinking"):
        messages[-1][thinking] = f"I add {i} and {i + 1}."
    return {dataset.get("field_messages") or "messages": messages}


def _alpaca(dataset: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {"instruction": question(i), "input": "Count." if i % 2 else "", "output": _answer(i)}


def _jeopardy(dataset: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {"category": "SUMS", "question": question(i), "answer": right(i)}


def _text(dataset: Mapping[str, Any], i: int) -> dict[str, Any]:
    field = dataset.get("text_column") or dataset.get("field") or "text"
    return {field: f"{question(i)} {_answer(i)}"}


def _pairs(dataset: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {"input": question(i), "chosen": right(i), "rejected": f"I think that it is {3 * i}."}


_SUPERVISED: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "chat_template": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "jeopardy": _jeopardy,
    "completion": _text,
    "pretrain": _text,
    "bradley_terry.chat_template": _pairs,
}


def write_rows(rows: list[dict[str, Any]], stem: Path) -> Path:
    """Write rows into a file beside ``stem``: Parquet if they hold bytes, else lines of JSON."""
    if "images" in rows[0]:
        import pyarrow as pa
        from pyarrow import parquet

        file = stem.with_suffix(".parquet")
        parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    file = stem.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# --- rows with images, and with sound -------------------------------------------------------------

_COLOURS = ("red", "green", "blue")


def image(i: int) -> bytes:
    """A file with a square in one of three colours, which the answer names."""
    drawn = Image.new("RGB", (24 + 8 * (i % 3), 32), "white")
    ImageDraw.Draw(drawn).rectangle([6, 6, 18, 18], fill=_COLOURS[i % 3])
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()


def _in_table(i: int) -> dict[str, Any]:
    """As HuggingFaceH4/llava-instruct-mix-vsft: parts with all fields, images in a column."""
    asked = [{"index": None, "text": "Which colour?\n", "type": "text"},
             {"index": 0, "text": None, "type": "image"}]  # fmt: skip
    said = [{"index": None, "text": _COLOURS[i % 3], "type": "text"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns, "images": [{"bytes": image(i), "path": None}]}


def _in_parts(i: int) -> dict[str, Any]:
    """As Axolotl's page on several media has it; every second row is of text alone."""
    text = {"type": "text", "text": "Which colour?" if i % 2 else question(i)}
    content = base64.b64encode(image(i)).decode()
    asked = [{"type": "image", "base64": content}, text] if i % 2 else [text]
    said = [{"type": "text", "text": _COLOURS[i % 3] if i % 2 else right(i)}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    }


def _with_sound(i: int) -> dict[str, Any]:
    asked = [{"type": "audio", "path": f"{i}.wav"}, {"type": "text", "text": "What is said?"}]
    said = [{"type": "text", "text": right(i)}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    }


_OF_MEDIA: dict[str, Callable[[int], dict[str, Any]]] = {
    "HuggingFaceH4/llava-instruct-mix-vsft": _in_table,
    "Nanobit/text-vision-2k-test": _in_parts,
    "Nanobit/text-vision-audio-2k-test": lambda i: (_in_parts if i % 3 else _with_sound)(i),
    "NanoBit/text-audio-2k-test": _with_sound,
}
"""The formats of public datasets with more than text, by their names."""
