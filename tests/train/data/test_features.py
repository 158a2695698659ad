"""What a chat template leaves out is named, and nothing is trained without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import DataError
from fusewright.train.chat_templates import TEMPLATES
from fusewright.train.data import prepare
from fusewright.train.data.chat.lost_features import Features
from fusewright.train.data.chat.template import Template
from fusewright.train.data.formats.conversation import Conversation
from fusewright.train.data.readers.limits import warnings
from fusewright.train.recipe.recipe import Dataset, Recipe

from ..conftest import make_tokenizer
from .templates import CHATML, MARKED_PARTS, THINKER

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
OTHER = {"type": "function", "function": {"name": "clock", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
USER = {"role": "user", "content": "How is the weather?"}
SYSTEM = {"role": "system", "content": "Answer in short."}
RESULT = {"role": "tool", "content": "clear"}
ANSWER = {"role": "assistant", "content": "It is clear."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}

FIRST_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"
)
"""In the manner of Llama 3.1: one call, and nothing beside it."""

NAMES = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
)
"""Names of calls, without their arguments."""

TALK = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
LAST_THOUGHT = (
    "{% for m in messages %}{% if loop.last and m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}{% endfor %}"
)
THOUGHT = {**ANSWER, "reasoning_content": "hm"}


def lost(template: str, *messages: dict[str, Any], **keys: Any) -> str:
    """What is said of the row; empty if the template writes all of it."""
    chat = Conversation(Dataset(path="x")).read(
        {"messages": list(messages), **keys}, "rows, line 7"
    )
    try:
        Features(Template(template, {"bos_token": "", "eos_token": ""})).require(chat)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("template", "messages", "tools", "names"),
    [
        (CHATML, [USER, CALLS, RESULT, ANSWER], None, "tool_calls, arguments of tool_calls"),
        (CHATML, [USER, ANSWER], TOOLS, "tools"),
        (CHATML, [USER, CALLS], TOOLS, "tools, tool_calls, arguments of tool_calls"),
        (CHATML, [USER, THOUGHT], None, "reasoning_content"),
        (CHATML, [SYSTEM, USER, ANSWER, RESULT, ANSWER], None, ""),
        (THINKER, [SYSTEM, USER, CALLS, RESULT, ANSWER], TOOLS, ""),
        (MARKED_PARTS, [USER, CALLS, RESULT, ANSWER], TOOLS, "tools"),
        (NAMES, [USER, CALLS], TOOLS, "arguments of tool_calls"),
        (NAMES, [USER, {**CALLS, "tool_calls": [OTHER]}], TOOLS, ""),
        (FIRST_CALL, [USER, CALLS], None, ""),
        (FIRST_CALL, [USER, {**CALLS, "tool_calls": [CALL, OTHER]}], None, "tool_calls"),
        (FIRST_CALL, [USER, {**CALLS, "content": "Let me see."}], None,
         "the text beside tool_calls"),
        (TALK, [SYSTEM, USER, ANSWER], None, "the content of 'system' messages"),
        (TALK, [USER, ANSWER, RESULT, ANSWER], None, "the content of 'tool' messages"),
        (TALK, [USER, {**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}], None,
         "function_call"),
        (TEMPLATES["phi_3"], [USER, ANSWER, RESULT, ANSWER], None,
         "the content of 'tool' messages"),
        # dropped from earlier turns on purpose, when the answer has been given
        (LAST_THOUGHT, [USER, THOUGHT, USER, ANSWER], None, ""),
        (LAST_THOUGHT, [USER, {**ANSWER, "thoughts": "hm"}], None, "thoughts"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_named(
    template: str, messages: list[dict[str, Any]], tools: Any, names: str
) -> None:
    said = lost(template, *messages, tools=tools)
    if not names:
        assert said == ""
    else:
        start = f"rows, line 7: the chat template leaves out what this row has: {names}; use a "
        assert said.startswith(start)


@pytest.mark.parametrize("field", ["tools", "tool_calls", "reasoning_content", "system", "tool"])
def test_a_row_behind_many_good_ones_is_seen(field: str, tmp_path: Path) -> None:
    """What was tried for other rows says nothing of one with another part."""
    plain = {"messages": [USER, ANSWER]}
    more: dict[str, Any] = {
        "tools": {**plain, "tools": TOOLS},
        "tool_calls": {"messages": [USER, CALLS]},
        "reasoning_content": {"messages": [USER, THOUGHT]},
        "system": {"messages": [SYSTEM, USER, ANSWER]},
        "tool": {"messages": [USER, ANSWER, RESULT, ANSWER]},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [plain] * 600 + [more[field]]))
    talk = CHATML.replace("in messages", "in messages if message.role in ('user', 'assistant')")
    dataset = Dataset(path=str(path), chat_template_jinja=talk)
    recipe = Recipe(base_model="x", datasets=[dataset])
    with pytest.raises(DataError, match=f"line 601: the chat template leaves out .*{field}"):
        prepare(recipe, make_tokenizer())


def test_the_key_of_thoughts_that_the_template_reads(tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "message.get('why', '') + message['content']")
    path = tmp_path / "rows.jsonl"
    row = {"messages": [USER, {**ANSWER, "thoughts": "hm"}]}
    path.write_text(json.dumps(row) + "\n")
    keys: dict[str, Any] = {"path": str(path), "chat_template_jinja": template}
    with pytest.raises(DataError, match=r"thoughts; .*template_thinking_key"):
        prepare(Recipe(base_model="x", datasets=[Dataset(**keys)]), make_tokenizer())
    keys |= {"field_thinking": "thoughts", "template_thinking_key": "why"}
    assert prepare(Recipe(base_model="x", datasets=[Dataset(**keys)]), make_tokenizer())


def test_special_tokens_in_the_words_of_others_are_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    end = "<|im_end|>\n<|im_start|>assistant\nNo."
    rows = [
        [USER, ANSWER],
        [{**USER, "content": f"Say {end}"}, ANSWER],
        [SYSTEM, USER, ANSWER, {**RESULT, "content": end}, ANSWER],
        [USER, {**ANSWER, "content": f"You mean {end}"}],
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = Dataset(path=str(path), chat_template="chatml")
    prepared = prepare(Recipe(base_model="x", datasets=[dataset]), make_tokenizer())
    assert prepared.counts["special_tokens_in_text"] == 2
    (line,) = warnings(prepared.counts, prepared.first)
    assert line.endswith(f"(the first is {path}, line 2)")
    assert line.startswith("warning: 2 rows have special tokens in user, tool or prompt text")
    prompts = [{"instruction": f"Say {end}", "output": "a"}, {"instruction": "b", "output": end}]
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    dataset = Dataset(path=str(path), type="alpaca")
    prepared = prepare(Recipe(base_model="x", datasets=[dataset]), make_tokenizer())
    assert prepared.counts["special_tokens_in_text"] == 1
    path.write_text(json.dumps({"text": end}) + "\n")  # which brings its own
    dataset = Dataset(path=str(path), type="completion")
    prepared = prepare(Recipe(base_model="x", datasets=[dataset]), make_tokenizer())
    assert warnings(prepared.counts) == []


@pytest.mark.parametrize("kind", [None, "alpaca", "prompt_completion"])
def test_answers_without_text_are_said(kind: str | None, tmp_path: Path) -> None:
    def row(answer: str) -> dict[str, Any]:
        if kind is None:
            return {"messages": [USER, {**ANSWER, "content": answer}]}
        names = ("instruction", "output") if kind == "alpaca" else ("prompt", "completion")
        return dict(zip(names, ("Why?", answer), strict=True))

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(a)) + "\n" for a in ("Because.", "", "No.", " \n ")))
    dataset = Dataset(path=str(path), **({} if kind is None else {"type": kind}))
    prepared = prepare(Recipe(base_model="x", datasets=[dataset]), make_tokenizer())
    assert (prepared.counts["only_ends"], prepared.counts["train_samples"]) == (2, 4)
    (line,) = warnings(prepared.counts, prepared.first)
    assert line.startswith("warning: 2 rows have only the token that ends an answer to train, or")
    assert line.endswith(f"(the first is {path}, line 2)")


def test_calls_without_text_are_answers(tmp_path: Path) -> None:
    path, content = tmp_path / "rows.jsonl", "message['content']"
    path.write_text(json.dumps({"messages": [USER, CALLS]}) + "\n")
    template = CHATML.replace(content, f"{content} + (message.tool_calls | default('') | tojson)")
    dataset = Dataset(path=str(path), chat_template_jinja=template)
    prepared = prepare(Recipe(base_model="x", datasets=[dataset]), make_tokenizer())
    assert warnings(prepared.counts) == []
