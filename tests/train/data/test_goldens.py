"""Masks token by token, as text for people to read: five templates, with a system turn and tools.

``pytest tests/train/data/test_goldens.py --update-goldens`` writes the files anew. Each was read by
hand, token by token: trained (``>``) is what the assistant has to write, and the token that ends
its turn; everything else is not. Beside the text, what is trained is told in plain words here.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from fusewright.train.data import IGNORED
from fusewright.train.data.chat.encoder import ChatEncoder
from fusewright.train.data.formats.conversation import Conversation
from fusewright.train.data.readers.limits import Limits, keep
from fusewright.train.recipe.recipe import Dataset

from .templates import CHATML, LLAMA3, MARKED, MARKED_PARTS, THINKER, tokenizer_for

FOLDER = pathlib.Path(__file__).parent / "golden"

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TEXTS = [
    {"role": "system", "content": "Answer in short."},
    {"role": "user", "content": "Who are you?\nSay <|it|>."},
    {"role": "assistant", "content": "A model 🙂"},
    {"role": "user", "content": "assistant: how is the weather in Köln?"},
    {"role": "assistant", "content": "Let me look."},
    {"role": "tool", "content": '{"sky": "clear"}'},
    {"role": "assistant", "content": "It is clear.\n"},
    {"role": "user", "content": "Thanks."},
]
"""A conversation for templates that know nothing of calls; it ends with the user."""

CALLS: list[dict[str, Any]] = [
    *TEXTS[:3],
    TEXTS[3],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    TEXTS[5],
    {"role": "assistant", "content": "<think>\nBlue sky.\n</think>\n\nIt is clear."},
]
"""The same with a call, and with a thought at the end."""

CASES: dict[str, tuple[str, str | None, str, list[dict[str, Any]], Any, list[str]]] = {
    "chatml": (
        CHATML, None, "<|im_end|>", TEXTS, None,
        ["A model 🙂<|im_end|>", "Let me look.<|im_end|>", "It is clear.\n<|im_end|>"],
    ),
    "llama3": (
        LLAMA3, "<|begin_of_text|>", "<|eot_id|>", TEXTS, None,
        ["A model 🙂<|eot_id|>", "Let me look.<|eot_id|>", "It is clear.<|eot_id|>"],
    ),
    "thinker": (
        THINKER, None, "<|im_end|>", CALLS, TOOLS,
        [
            "A model 🙂<|im_end|>",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
            "<|im_end|>",
            "<think>\nBlue sky.\n</think>\n\nIt is clear.<|im_end|>",
        ],
    ),
    "marked": (
        MARKED, None, "<|im_end|>", TEXTS, None,
        ["A model 🙂<|im_end|>", "Let me look.<|im_end|>", "It is clear.\n<|im_end|>"],
    ),
    "marked_parts": (
        MARKED_PARTS, "<|end_of_text|>", "<|end_of_text|>", CALLS, None,
        [
            "A model 🙂<|end_of_text|>",
            '<|tool_call|>{"name": "weather", "arguments": {"city": "Köln"}}<|end_of_text|>',
            "<think>\nBlue sky.\n</think>\n\nIt is clear.<|end_of_text|>",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    template, bos, eos, messages, tools, trained = CASES[name]
    words = json.dumps([messages, TOOLS], ensure_ascii=False)
    tokenizer = tokenizer_for(template, words, bos, eos)
    row = {"messages": messages, "tools": tools}
    chat = Conversation(Dataset(path="x")).read(row, "x, line 1")
    part = keep(ChatEncoder(tokenizer).encode([chat]), Limits(10_000))
    ids, labels = part.ids.tolist(), part.labels.tolist()

    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        chat.messages, tools=tools, tokenize=False
    )
    runs: list[list[int]] = [[]]
    lines = []
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
        text = tokenizer.convert_ids_to_tokens(token)
        shown = text if token in tokenizer.all_special_ids else tokenizer.decode([token])
        lines.append(f"{'>' if label != IGNORED else ' '} {json.dumps(shown, ensure_ascii=False)}")
    assert [tokenizer.decode(run) for run in runs if run] == trained
    path = FOLDER / f"{name}.txt"
    table = "\n".join(lines) + "\n"
    if request.config.getoption("--update-goldens"):
        path.write_text(table, encoding="utf-8")
    assert table == path.read_text(encoding="utf-8")
