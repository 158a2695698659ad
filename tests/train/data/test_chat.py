"""Masks, token by token: the assistant's words and the end of its turn, nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import IGNORED, Sample
from fusewright.train.data.chat import Chat, ChatEncoder, Rules
from fusewright.train.data.limits import Limits, keep

from ..conftest import CHATML, make_tokenizer

HEADER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}" + PROMPT
)
MARKED_WITHOUT_END = (
    HEADER
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}" + PROMPT
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + "
    "'<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "assistant\nWhy <é>?"},
    {"role": "assistant", "content": "Why not 😀"},
]


def trained(sample: Sample, tokenizer: Any) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def one(template: str, messages: list[dict[str, str]], **options: Any) -> tuple[Sample, Any]:
    tokenizer = make_tokenizer(template)
    encoder = ChatEncoder(tokenizer, rules=Rules(**options))
    part = keep(encoder.encode([Chat("file, line 1", messages)]), Limits(10_000))
    return Sample(part.ids.tolist(), part.labels.tolist()), tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END, LLAMA3])
def test_answers_and_ends_of_turn_are_trained(template: str) -> None:
    sample, tokenizer = one(template, CONVERSATION)
    assert trained(sample, tokenizer) == ["Yo.<|im_end|>", "Why not 😀<|im_end|>"]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)
    assert sample.input_ids == whole["input_ids"]


def test_a_table_token_by_token() -> None:
    sample, tokenizer = one(CHATML, CONVERSATION[1:3])
    shown = [
        (tokenizer.decode([t]), label != IGNORED)
        for t, label in zip(sample.input_ids, sample.labels, strict=True)
    ]
    prompt = ["<|im_start|>", *"user\nHi?", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
    answer = [*"Yo.", "<|im_end|>"]
    assert shown == [*((t, False) for t in prompt), *((t, True) for t in answer), ("\n", False)]


def test_without_an_end_token_the_line_break_ends_the_turn() -> None:
    sample, tokenizer = one(PLAIN, CONVERSATION)
    assert trained(sample, tokenizer) == ["Yo.\n", "Why not 😀\n"]


def test_a_token_that_begins_in_the_prompt_is_not_trained() -> None:
    answer = [CONVERSATION[1], {"role": "assistant", "content": "\nA"}]
    sample, tokenizer = one(CHATML, answer)  # "assistant\n" + "\nA": both breaks are one token
    assert trained(sample, tokenizer) == ["A<|im_end|>"]


def test_an_empty_answer_is_only_its_end() -> None:
    sample, tokenizer = one(CHATML, [CONVERSATION[1], {"role": "assistant", "content": ""}])
    assert trained(sample, tokenizer) == ["<|im_end|>"]


def test_train_on_inputs_trains_all_but_the_first_token() -> None:
    sample, _ = one(CHATML, CONVERSATION, everything=True)
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_an_assistant_that_begins() -> None:
    sample, tokenizer = one(CHATML, CONVERSATION[2:])
    assert trained(sample, tokenizer)[-1] == "Why not 😀<|im_end|>"
    assert "Yo." in trained(sample, tokenizer)[0]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = CHATML.replace("m['content'] +", "(m['content'] if loop.last else '...') +")
    with pytest.raises(DataError, match=r"file, line 1: .* mark it with \{% generation %\}"):
        one(forgetful, CONVERSATION)


def test_a_template_that_raises_is_quoted() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"file, line 1: .*roles must alternate"):
        one(strict, CONVERSATION)


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(RecipeError, match="no chat template"):
        ChatEncoder(make_tokenizer(None))
