"""Rows of preferences with one mistake each: one clear message, with the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import prepare

from ..conftest import make_tokenizer
from .preference_rows import assistant, prepared, recipe, user

GOOD: dict[str, Any] = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
TALK: dict[str, Any] = {"prompt": [user("Why?")], "chosen": [assistant("a")], "rejected": "b"}
JUDGED: dict[str, Any] = {"prompt": "Why?", "completion": "a", "label": True}
STEPS: dict[str, Any] = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
TWICE: dict[str, Any] = {
    "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")],
}  # fmt: skip
DIFFERENT: dict[str, Any] = {**TWICE, "rejected": [user("d"), assistant("c")]}
CALL: dict[str, Any] = {
    "role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}],
}  # fmt: skip

DPO: dict[str, Any] = {"rl": "dpo"}
KTO: dict[str, Any] = {"rl": "kto"}
GRPO: dict[str, Any] = {"rl": "grpo"}
PRM: dict[str, Any] = {"process_reward_model": True}
Case = tuple[dict[str, Any], str, Any, Any, str]


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


CASES: dict[str, Case] = {
    # --- pairs: method, type, a good row, a bad row, what is said ---
    "no better answer": (
        DPO, "chat_template", GOOD, without(GOOD, "chosen"),
        "the field 'chosen' is missing (the row has 'prompt', 'rejected'); name the field that has "
        "it with field_chosen",
    ),
    "no worse answer": (
        DPO, "chat_template", GOOD, without(GOOD, "rejected"), "the field 'rejected' is missing",
    ),
    "a null answer": (
        DPO, "chat_template", GOOD, {**GOOD, "rejected": None},
        "the field 'rejected' must be text or a list of messages, not null; leave rows without",
    ),
    "a number for an answer": (
        DPO, "chat_template", GOOD, {**GOOD, "chosen": 5},
        "the field 'chosen' must be text or a list of messages, not a number",
    ),
    "no messages in an answer": (
        DPO, "chat_template", GOOD, {**GOOD, "chosen": []},
        "the field 'chosen' must be text or a list of messages, not an empty list",
    ),
    "text for a message": (
        DPO, "chat_template", TALK, {**TALK, "chosen": ["a"]},
        "'chosen': message 1 must be an object with the fields 'role' and 'content', not text",
    ),
    "a message without content": (
        DPO, "chat_template", TALK, {**TALK, "rejected": [{"role": "assistant"}]},
        "'rejected': message 1 needs the field 'content', with text in it",
    ),
    "an unknown role in an answer": (
        DPO, "chat_template", TALK, {**TALK, "chosen": [{"role": "asistant", "content": "a"}]},
        "'chosen': message 1 has the role 'asistant', which is not one of",
    ),
    "an unknown role in a prompt": (
        DPO, "chat_template", TALK, {**TALK, "prompt": [{"role": "usr", "content": "a"}]},
        "'prompt': message 1 has the role 'usr', which is not one of",
    ),
    "an answer of the user": (
        DPO, "chat_template", TALK, {**TALK, "chosen": [assistant("a"), user("thanks")]},
        "'chosen' ends with a message of the role 'user'; it must end with the assistant's answer: "
        "remove what comes after that, or leave the row out",
    ),
    "the user within an answer": (
        DPO, "chat_template", TALK,
        {**TALK, "chosen": [assistant("a"), user("b"), assistant("c")]},
        "'chosen' has a message of the role 'user' behind the prompt; only the assistant's last",
    ),
    "a prompt that ends with an answer": (
        DPO, "chat_template", TALK, {**TALK, "prompt": [user("Why?"), assistant("a")]},
        "the prompt in 'prompt' ends with a message of the assistant; it must end with the user's",
    ),
    "a number for a prompt": (
        DPO, "chat_template", GOOD, {**GOOD, "prompt": 3},
        "the field 'prompt' must be text or a list of messages, not a number; leave rows without a "
        "prompt out",
    ),
    "no messages in a prompt": (
        DPO, "chat_template", TALK, {**TALK, "prompt": []},
        "there is no prompt: put it into the field 'prompt' or 'messages'",
    ),
    "answers alone": (
        DPO, "chat_template", TALK, {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "'chosen' and 'rejected' do not begin with the same message, so there is no prompt",
    ),
    "texts that begin differently": (
        DPO, "chat_template", GOOD, {"chosen": "yes it is", "rejected": "no"},
        "'chosen' and 'rejected' do not begin alike, so there is no prompt: put it into",
    ),
    "conversations of two questions": (
        DPO, "chat_template", TALK,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "'chosen' and 'rejected' do not begin with the same message, so there is no prompt",
    ),
    "conversations that part early": (
        DPO, "chat_template", TALK,
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
         "rejected": [user("a"), assistant("x"), user("c"), assistant("d")]},
        "'chosen' has a message of the role 'user' behind the prompt",
    ),
    "whole conversations of two questions": (
        DPO, "chat_template.argilla", TWICE, DIFFERENT,
        "the messages before the answer differ in 'chosen' and 'rejected'; only answers to the",
    ),
    "two questions in ChatML": (
        DPO, "chatml.argilla_chat", TWICE, DIFFERENT, "the messages before the answer differ in",
    ),
    "two questions beside a prompt": (
        DPO, "llama3.ultra", {"prompt": "a", **TWICE}, {"prompt": "a", **DIFFERENT},
        "the messages before the answer differ in",
    ),
    "two questions of messages beside a prompt": (
        DPO, "chat_template", {"prompt": [user("a")], **TWICE},
        {"prompt": [user("a")], **DIFFERENT},
        "'rejected' has a message of the role 'user' behind the prompt",
    ),
    "calls in an answer": (
        DPO, "chatml.ultra", GOOD, {**GOOD, "chosen": [user("a"), CALL]},
        "'chosen' has tool_calls, which this type cannot write; use type: chat_template",
    ),
    "calls before an answer": (
        DPO, "llama3", GOOD,
        {**GOOD, "rejected": [user("a"), {**CALL, "content": "hm"}, assistant("b")]},
        "'rejected' has tool_calls, which this type cannot write; use type: chat_template",
    ),
    "calls in a labelled answer": (
        KTO, "chatml", JUDGED, {**JUDGED, "completion": [user("a"), CALL]},
        "'completion' has tool_calls, which this type cannot write; use type: chat_template",
    ),
    "a list for a row": (
        DPO, "chat_template", GOOD, [], "must be an object with the field 'chosen', not a list",
    ),
    "a text for a row": (
        DPO, "chatml", GOOD, "a", "must be an object with the field 'chosen', not text",
    ),
    "labelled rows": (
        DPO, "chat_template", GOOD, JUDGED,
        "the field 'chosen' is missing (the row has 'prompt', 'completion', 'label'); such rows "
        "are for rl: kto",
    ),
    "an image": (
        DPO, "chat_template", TALK, {**TALK, "prompt": [user([{"type": "image", "url": "x"}])]},
        "'prompt': the row has an image, and the model reads text only: leave images out",
    ),
    "a system message that is none": (
        DPO, "chatml", GOOD, {**GOOD, "system": ["a"]}, "the field 'system' must be text, not a l",
    ),
    "another field for the prompt": (
        DPO, "chatml.intel", {**GOOD, "question": "a"}, GOOD,
        "the field 'question' is missing (the row has 'prompt', 'chosen', 'rejected'); rename the",
    ),
    "messages for a prompt of text": (
        DPO, "chatml", GOOD, {**GOOD, "prompt": [user("a")]},
        "the field 'prompt' must be text, not a list; for messages, use a type that reads them",
    ),
    "a number for a text": (
        DPO, "llama3", GOOD, {**GOOD, "chosen": 1},
        "the field 'chosen' must be text or a list of messages, not a number; leave rows without "
        "an answer out",
    ),
    "a conversation that ends with the user": (
        DPO, "chatml.ultra", GOOD, {**GOOD, "chosen": [user("a"), user("b")]},
        "'chosen' ends with a message of the role 'user'; it must end with the assistant's answer: "
        "remove what comes after that, or leave the row out",
    ),
    "no question in a conversation": (
        DPO, "chatml.argilla_chat",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "'chosen' has no question before the answer; this type needs both in it",
    ),
    # --- labelled answers ---
    "no label": (
        KTO, "chat_template", JUDGED, without(JUDGED, "label"),
        "the field 'label' is missing (the row has 'prompt', 'completion'); rename the field",
    ),
    "a word for a label": (
        KTO, "chat_template", JUDGED, {**JUDGED, "label": "good"},
        "the field 'label' must be true or false, not text; convert ratings to true (good) or",
    ),
    "a rating for a label": (
        KTO, "chatml", JUDGED, {**JUDGED, "label": 4}, "'label' must be true or false, not 4",
    ),
    "a null label": (
        KTO, "chat_template", JUDGED, {**JUDGED, "label": None},
        "the field 'label' must be true or false, not null; leave rows without a label out",
    ),
    "pairs for labelled answers": (
        KTO, "chat_template", JUDGED, GOOD,
        "the field 'completion' is missing (the row has 'prompt', 'chosen', 'rejected'); such rows "
        "are for rl: dpo, orpo,",
    ),
    "no prompt before a text": (
        KTO, "chat_template", JUDGED, {"completion": "a", "label": True},
        "there is no prompt: put it into the field 'prompt' or 'messages', or as messages before",
    ),
    # --- prompts ---
    "no prompt": (
        GRPO, "chat_template", {"prompt": "ab"}, {"question": "ab"},
        "the field 'prompt' is missing (the row has 'question'); rename the field that has it",
    ),
    "an empty list for a prompt": (
        GRPO, "chat_template", {"prompt": "ab"}, {"prompt": []},
        "the field 'prompt' must be text or a list of messages, not an empty list; leave rows "
        "without a prompt out",
    ),
    "an answer in the prompt": (
        GRPO, "chat_template", {"prompt": "ab"}, {"prompt": [user("a"), assistant("b")]},
        "the prompt in 'prompt' ends with a message of the assistant; it must end with the user's: "
        "keep the answer in a field of its own",
    ),
    "a name that the trainer needs": (
        GRPO, "chat_template", {"prompt": "ab"}, {"prompt": "ab", "completions": ["a"]},
        "the field 'completions' has a name that the trainer keeps for itself; rename it",
    ),
    "tokens of a prompt": (
        GRPO, "chat_template", {"prompt": "ab"}, {"prompt": "ab", "prompt_ids": [1]},
        "the field 'prompt_ids' has a name that the trainer keeps for itself; rename it",
    ),
    "another prompt": (
        GRPO, "chat_template", {"messages": [user("a")]},
        {"messages": [user("a")], "prompt": "ab"},
        "the field 'prompt' has a name that the trainer keeps for itself; rename it",
    ),
    # --- steps ---
    "no steps": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "completions": []},
        "the field 'completions' must be a list with an item for each step, not an empty list; "
        "split an answer into its steps, or leave the row out",
    ),
    "text for steps": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "completions": "b"},
        "the field 'completions' must be a list with an item for each step, not text",
    ),
    "a number for a step": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "completions": ["a", 3]},
        "step 2 in 'completions' must be text, not a number",
    ),
    "fewer labels than steps": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "labels": [True]},
        "there are 2 'completions' and 1 'labels'; each step needs one label: add those that are "
        "missing, or leave the row out",
    ),
    "a rating for a step": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "labels": [True, 0.5]},
        "label 2 in 'labels' must be true or false, not 0.5; convert ratings first",
    ),
    "a list for a prompt of steps": (
        PRM, "stepwise_supervised", STEPS, {**STEPS, "prompt": [user("a")]},
        "the field 'prompt' must be text, not a list; write messages as one text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malformed(name: str, tmp_path: Path) -> None:
    keys, kind, good, bad, said = CASES[name]
    assert prepared(tmp_path, [good], keys, type=kind).counts["rows"] == 1
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, [good, bad], keys, type=kind)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/rows.jsonl, line 2: ")
    assert said in message
    assert "\n" not in message


def test_more_than_two_labels_of_steps(tmp_path: Path) -> None:
    keys = {**PRM, "num_labels": 3}
    row = {**STEPS, "labels": [2, 0]}
    assert prepared(tmp_path, [row], keys, type="stepwise_supervised").counts["rows"] == 1
    with pytest.raises(DataError, match="label 1 in 'labels' must be a number from 0 to 2, not 3"):
        prepared(tmp_path, [{**row, "labels": [3, 0]}], keys, type="stepwise_supervised")


def test_a_field_that_cannot_be_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["ab"], "seen": pa.array([0], pa.timestamp("s"))}), path)
    whole = recipe(tmp_path, [], GRPO, {"path": str(path)})
    with pytest.raises(DataError, match="row 1: the field 'seen' holds a datetime, which cannot"):
        prepare(whole, make_tokenizer())


@pytest.mark.parametrize("row", [TALK, {"prompt": [user("a")]}])
def test_messages_need_a_template(row: dict[str, Any], tmp_path: Path) -> None:
    keys = DPO if "chosen" in row else GRPO
    with pytest.raises(RecipeError, match="line 1 has messages, and the tokenizer of base_model"):
        prepared(tmp_path, [row], keys, make_tokenizer(None))
    assert prepared(tmp_path, [GOOD], DPO, make_tokenizer(None)).counts["rows"] == 1


def test_a_template_that_refuses(tmp_path: Path) -> None:
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    for row, keys in ((TALK, DPO), ({"prompt": [user("a")]}, GRPO)):
        with pytest.raises(DataError, match="line 1: the chat template refuses this conversation"):
            prepared(tmp_path, [row], keys, refusing)


def test_a_template_that_leaves_the_answer_out(tmp_path: Path) -> None:
    deaf = make_tokenizer("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
                          "{% endif %}{% endfor %}")  # fmt: skip
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1"):
        prepared(tmp_path, [TALK], DPO, deaf)
