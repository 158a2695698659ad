"""A few rows in the format that a recipe's dataset has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
