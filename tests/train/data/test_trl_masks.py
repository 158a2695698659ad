"""Turns that are found in the templates of models, against the marks that TRL put into them.

TRL has a copy with generation marks of many a template. Where both copies write the same text, the
answers that are found in the one end where those marked in the other end. They begin there too,
except that some marks include the header that a generation prompt has given already.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import DataError
from fusewright.train.data.chat.encoder import ChatEncoder
from fusewright.train.data.chat.template import Chat

from ..conftest import make_tokenizer

trl = pytest.importorskip("trl", reason="the templates are TRL's, which only benchmarks need")
FOLDER = Path(trl.__file__).parent / "chat_templates"

SAME = (
    "cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "qwen2_5_vl", "qwen3",
    "qwen3_instruct_2507", "qwen3_vl",
)  # fmt: skip
"""Where the marks begin behind the generation prompt."""

WITH_HEADER = (
    "deepseek_r1_distill", "gptoss", "muse_glimmer", "nemotron_3_nano", "qwen2_5", "qwen3_6",
    "qwen3_8",
)  # fmt: skip
"""Where they begin before it."""

CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("Hi?"), assistant("Yo t.")],
    [user("Hi?"), assistant("t"), user("Why?"), assistant("Not <é> 😀")],
    [{"role": "system", "content": "Be brief."}, user("Hi?"), assistant("Yo."), user("ok")],
    [user(" Hi?\n"), assistant("\n Yo. "), user("c"), assistant("d\n")],
    [user("a"), assistant("<think>\nhm\n</think>\n\nYo."), user("c"), assistant("t")],
    [user("a"), assistant("", tool_calls=CALL), {"role": "tool", "content": "r"}, assistant("d")],
    [user("a"), assistant("b", tool_calls=CALL), {"role": "tool", "content": "r"},
     assistant("d"), user("e"), assistant("f")],
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    words = re.compile(r"<\|[\w./-]+\|>|<｜[^｜]+｜>|<\w+_of_turn>")
    known = {w for path in FOLDER.glob("*.jinja") for w in words.findall(path.read_text("utf-8"))}
    made.add_special_tokens({"additional_special_tokens": sorted(known)})
    return made


@pytest.mark.parametrize("name", [*SAME, *WITH_HEADER])
def test_found_turns_are_the_marked_ones(name: str, tokenizer: Any) -> None:
    if not (FOLDER / f"{name}_training.jinja").is_file():
        pytest.skip(f"this TRL has no {name}_training.jinja")
    plain, marked = (
        ChatEncoder(tokenizer, (FOLDER / f"{name}{kind}.jinja").read_text("utf-8"))
        for kind in ("", "_training")
    )
    compared = 0
    for messages in CONVERSATIONS:
        chat = [Chat("x", messages)]
        try:
            (theirs,) = marked.encode(chat)
        except DataError:  # the family knows no such role
            continue
        (ours,) = plain.encode(chat)
        if ours.ids != theirs.ids:  # TRL's copy keeps thoughts that the original drops
            continue
        compared += 1
        if name in SAME:
            assert ours.spans == theirs.spans
            continue
        assert [end for _, end in ours.spans] == [end for _, end in theirs.spans]
        for (begin, _), (before, _) in zip(ours.spans, theirs.spans, strict=True):
            assert before <= begin
            header = tokenizer.decode(ours.ids[before:begin])
            prompts = [
                tokenizer.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True,
                    chat_template=plain.templates["default"].source,
                )
                for i in range(1, len(messages))
                if messages[i]["role"] == "assistant"
            ]  # fmt: skip
            # a token of two line breaks may begin in it and end behind it
            assert any(header.rstrip() in p for p in prompts)
    assert compared
