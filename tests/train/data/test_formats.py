"""Types of rows: the text that each makes, and what of it is trained; names are the recipe's."""

from __future__ import annotations

from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.data.formats.registry import Encoder
from fusewright.train.recipe.keys.row_types import TYPES
from fusewright.train.recipe.recipe import Dataset, PromptFormat, Recipe

from ..conftest import chat, make_tokenizer

END = "<|im_end|>"
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)

CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request.\n\n"
)


def encoded(type_: Any, row: Any, recipe: dict[str, Any] | None = None, **keys: Any) -> list[Any]:
    """The pieces of a row's samples: ``(text, trained)``."""
    dataset = Dataset(path="rows.jsonl", type=type_, **keys)
    whole = Recipe(base_model="x", datasets=[dataset], **(recipe or {}))
    tokenizer = make_tokenizer()
    samples = []
    for tokens in Encoder(dataset, whole, tokenizer).encode([("rows.jsonl, line 1", row)]):
        pieces, at = [], 0
        for begin, end in [*tokens.spans, (len(tokens.ids),) * 2]:
            for a, b, trained in ((at, begin, False), (begin, end, True)):
                if a < b:
                    pieces.append((tokenizer.decode(tokens.ids[a:b]), trained))
            at = end
        samples.append(pieces)
    return samples


OWN = PromptFormat(
    format="Q: {instruction} ({input})\nA: ",
    no_input_format="Q: {instruction}\nA: ",
    system_prompt="Be exact.",
    system_format="{system}\n",
    field_output="answer",
)
INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("type_", "row", "prompt", "answer"),
    [
        ("alpaca", {**INSTRUCTION, "input": ""},
         f"{HEAD}### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ("alpaca", {"instruction": "Add.", "input": None, "output": "3"},
         f"{HEAD}### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ("alpaca_instruct.load_no_prompt", INSTRUCTION,
         "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
        ("alpaca_chat.load_qa", {"question": "Why?", "answer": "So."},
         f"SYSTEM: {CONCISE}\nUSER: Why?\nASSISTANT:", "So."),
        ("alpaca_chat.load_camel_ai", {"message_1": "Why?", "message_2": "So."},
         f"SYSTEM: {CONCISE}\nUSER: Why?\nASSISTANT:", "So."),
        ("alpaca:phi", {**INSTRUCTION, "input": ""},
         f"<|system|>\n{HEAD[:-2]}<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n", "3"),
        ("jeopardy", {"question": "It sums.", "category": "", "answer": "an adder"},
         f"{HEAD}### Instruction:\nIt sums.\n\n### Response:\n", "what is an adder"),
        ("summarizetldr", {"article": "Long.", "summary": "Short."},
         "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:", "Short."),
        ("alpaca_w_system", {**INSTRUCTION, "system": "Be exact."},
         "SYSTEM: Be exact.\nUSER: Add.\n1 2\nASSISTANT:", "3"),
        ("alpaca_w_system.load_open_orca",
         {"system_prompt": "", "question": "Why?", "response": "So."},
         "### Human:\nWhy?\n### Assistant:\n", "So."),
        ("gpteacher:chat", {"instruction": "Add.", "response": "3"},
         f"SYSTEM: {HEAD[:-2]}\nUSER: Add.\nASSISTANT:", "3"),
        ("prompt_completion", {"prompt": "1 + 1 = ", "completion": "2"}, "1 + 1 = ", "2"),
        (OWN, {"instruction": "{Add}.", "answer": "3"}, "Be exact.\nQ: {Add}.\nA: ", "3"),
        (PromptFormat(), {"instruction": "a", "input": "b", "output": "c"}, "a b", "c"),
    ],
)  # fmt: skip
def test_instructions(type_: Any, row: dict[str, Any], prompt: str, answer: str) -> None:
    assert encoded(type_, row) == [[(prompt, False), (answer + END, True)]]


def test_alpaca_with_an_input_and_other_names() -> None:
    row = {"frage": "Add.", "zu": "1 2", "antwort": "3"}
    names = {"field_instruction": "frage", "field_input": "zu", "field_output": "antwort"}
    ((prompt, answer),) = encoded("alpaca", row, **names)
    assert prompt[0].startswith("Below is an instruction that describes a task, paired with an")
    assert prompt[0].endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert answer == ("3" + END, True)


def test_a_prompt_of_ones_own() -> None:
    form = "Q: {instruction}\nC: {input}\n{{A}}: "
    for given, row in (
        ("1 2", INSTRUCTION),
        ("", {**INSTRUCTION, "input": ""}),
        ("", {"instruction": "Add.", "output": "3"}),
    ):
        (pieces,) = encoded("alpaca_instruct.load_no_prompt", row, input_format=form)
        assert pieces == [(f"Q: Add.\nC: {given}\n{{A}}: ", False), ("3" + END, True)]
    (pieces,) = encoded("alpaca", {**INSTRUCTION, "input": ""}, input_format=form)
    assert pieces[0][0] == f"{HEAD}Q: Add.\nC: \n{{A}}: "


def test_training_on_inputs() -> None:
    ((piece,),) = encoded("alpaca", INSTRUCTION, train_on_inputs=True)
    assert piece[1]
    assert piece == encoded("alpaca", INSTRUCTION, {"train_on_inputs": True})[0][0]
    assert not encoded("alpaca", INSTRUCTION, {"train_on_inputs": True}, train_on_inputs=False)[0][
        0
    ][1]


def test_a_completion_is_divided() -> None:
    short = {"sequence_len": 8}
    assert encoded("completion", {"text": "0123456789"}, short) == [
        [("01234567", True)], [("89" + END, True)],
    ]  # fmt: skip
    assert encoded("completion", {"body": "ab"}, field="body") == [[("ab" + END, True)]]
    assert encoded("completion", {"text": "ab" + END}) == [[("ab" + END, True)]]


def test_input_output_is_taken_as_it_is() -> None:
    row = {"segments": [{"label": False, "text": "a\n"}, {"label": True, "text": "\nb"}]}
    # "\n\n" would be one token if the pieces were tokenized together
    assert encoded("input_output", row) == [[("a\n", False), ("\nb", True)]]


@pytest.mark.parametrize("type_", ["chat_template", "sharegpt", "sharegpt.load"])
def test_conversations_by_any_name(type_: str) -> None:
    asked = "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    expected = [[(asked + "<|im_start|>assistant\n", False), ("a" + END, True), ("\n", False)]]
    turns = [("system", "Short."), ("human", "q"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert encoded(type_, row) == expected
    named = {"system": "Short.", **chat("q", "a")}
    assert encoded(type_, named) == expected
    parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
    assert encoded(type_, {"messages": parts}) == expected
    other = {"talk": [{"who": "S", "says": "Short."}, {"who": "A", "says": "q"},
                      {"who": "B", "says": "a"}]}  # fmt: skip
    keys = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"user": ["A"], "assistant": ["B"], "system": ["S"]},
    }
    assert encoded(type_, other, **keys) == expected
    dropped = encoded(type_, row, drop_system_message=True)
    assert dropped[0][0][0].startswith("<|im_start|>user")
    assert encoded(type_, chat("q", "a"), {"default_system_message": "Short."}) == expected


def test_prompts_and_completions_as_messages() -> None:
    row = {
        "prompt": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    (pieces,) = encoded("prompt_completion", row)
    assert [text for text, trained in pieces if trained] == ["d" + END]


def test_thoughts_are_split_off() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['why'] | default('') + '|' + m['content'] "
        "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    keys = {"chat_template_jinja": template, "template_thinking_key": "why"}
    answer = "<think>\nhm\n</think>\n\nYes."
    expected = [("user:|q<|im_end|>assistant:", False), ("hm|Yes." + END, True)]
    assert encoded("chat_template", chat("q", answer), split_thinking=True, **keys) == [expected]
    row = chat("q", "Yes.")
    row["messages"][1]["reasoning_content"] = "hm"
    assert encoded("chat_template", row, **keys) == [expected]


def test_prepared_tokens() -> None:
    ready = {"skip_prepare_dataset": True}
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    ((first, second),) = encoded("chat_template", row, ready)
    assert (first[1], second[1]) == (False, True)


def test_recipes_for_images_skip_no_preparation() -> None:
    """Axolotl's all set the key, and name a processor."""
    keys = {"skip_prepare_dataset": True, "processor_type": "AutoProcessor"}
    assert encoded("chat_template", chat("q", "Yes."), keys) == encoded(
        "chat_template", chat("q", "Yes.")
    )


def test_every_type_that_a_recipe_may_name_is_one_here() -> None:
    tokenizer = make_tokenizer()
    for name in TYPES:
        dataset = Dataset(path="x", type=name)
        Encoder(dataset, Recipe(base_model="x", datasets=[dataset]), tokenizer)
    wrong = Dataset(path="x", type="alpaka")
    with pytest.raises(RecipeError, match=r"'alpaka' is not a type of rows; did you mean alpaca\?"):
        Encoder(wrong, Recipe(base_model="x", datasets=[wrong]), tokenizer)


@pytest.mark.parametrize(
    "form", ["{frage}", "{0}", "{", "a}", "{instruction.a}", "{instruction[a]}", "{input!z}"]
)
def test_a_format_with_unknown_names(form: str) -> None:
    for key, type_, keys in (
        ("type.format", PromptFormat(format=form), {}),
        ("type.no_input_format", PromptFormat(no_input_format=form), {}),
        ("input_format", "alpaca", {"input_format": form}),
    ):
        with pytest.raises(RecipeError) as raised:
            encoded(type_, INSTRUCTION, **keys)
        said = f"datasets: {key}: only {{instruction}} and {{input}} can be filled in, and {form!r}"
        assert str(raised.value).startswith(said)
