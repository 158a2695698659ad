"""Small data sets of every format, and a tiny model whose template writes tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..conftest import make_model, make_tokenizer, numbers

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def _called(i: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 1}}}
    return {
        "messages": [
            {"role": "user", "content": f"What is {i} and 1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(i + 1)},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ],
        "tools": [TOOL],
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": numbers(60),
    "tools": [_called(i) for i in range(60)],
    "alpaca": [
        {"instruction": f"Name {i}.", "output": f"It is {i}.", **({"input": "!"} if i % 2 else {})}
        for i in range(60)
    ],
    "completion": [{"text": f"The number {i} is one more than {i - 1}. " * 9} for i in range(60)],
    "preferences": [
        {"prompt": f"What is {i}?\n", "chosen": f"It is {i}.", "rejected": "No."} for i in range(60)
    ],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is one of the test's own: a recipe's output_dir is relative."""
    monkeypatch.chdir(tmp_path)
