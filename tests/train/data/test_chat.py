"""Masks, token by token: the assistant's words and the end of its turn, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import IGNORED, Sample
from fusewright.train.data.chat.encoder import ChatEncoder
from fusewright.train.data.chat.mask import Rules
from fusewright.train.data.chat.template import Chat, Template
from fusewright.train.data.readers.limits import Limits, keep

from ..conftest import CHATML, make_tokenizer
from .templates import THINKER, tokenizer_for

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
        one(forgetful, CONVERSATION[1:])


def test_a_template_that_raises_is_quoted() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"file, line 1: .*roles must alternate"):
        one(strict, CONVERSATION)


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(RecipeError, match="no chat template"):
        ChatEncoder(make_tokenizer(None))


# --- what is trained -----------------------------------------------------------------------------


TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("rules", "runs"),
    [
        ({}, ["Yo.<|im_end|>", "So.<|im_end|>"]),
        ({"eos": "none"}, ["Yo.", "So."]),
        ({"eos": "last"}, ["Yo.", "So.<|im_end|>"]),
        ({"eos": "all"}, ["<|im_end|>", "Yo.<|im_end|>", "<|im_end|>", "So.<|im_end|>"]),
        ({"roles": {"user"}}, ["Hi?<|im_end|>", "Why?<|im_end|>"]),
        (
            {"roles": {"user", "assistant"}},
            ["Hi?<|im_end|>", "Yo.<|im_end|>", "Why?<|im_end|>", "So.<|im_end|>"],
        ),
        ({"roles": {"user"}, "eos": "none"}, ["Hi?", "Why?"]),
    ],
)
def test_roles_and_ends(template: str, rules: dict[str, Any], runs: list[str]) -> None:
    roles = frozenset(rules.get("roles", {"assistant"}))
    sample, tokenizer = one(template, TURNS, **{**rules, "roles": roles})
    assert trained(sample, tokenizer) == runs


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ([None, False, None, None], ["So.<|im_end|>"]),
        ([None, None, True, False], ["Yo.<|im_end|>", "Why?<|im_end|>"]),
        (
            [None, [{"begin_offset": 0, "end_offset": 1, "train": True}], None, False],
            ["Yo", "<|im_end|>"],
        ),
        (
            [
                None,
                [
                    {"begin_offset": 0, "end_offset": 0, "train": False},
                    {"begin_offset": 1, "end_offset": 2, "train": True},
                ],
                None,
                None,
            ],
            ["o.<|im_end|>", "So.<|im_end|>"],
        ),
    ],
)
def test_messages_say_themselves_what_is_trained(
    template: str, flags: list[Any], runs: list[str]
) -> None:
    tokenizer = make_tokenizer(template)
    part = keep(ChatEncoder(tokenizer).encode([Chat("f", TURNS, train=flags)]), Limits(1000))
    sample = Sample(part.ids.tolist(), part.labels.tolist())
    assert trained(sample, tokenizer) == runs


def test_another_end_of_turn_has_its_own_rule() -> None:
    other = CHATML.replace("<|im_end|>", "<|eot|>")
    tokenizer = make_tokenizer(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    for rule, runs in (("turn", ["Yo.<|eot|>", "So.<|eot|>"]), ("last", ["Yo.", "So.<|eot|>"])):
        rules = Rules(eot=rule, eot_tokens=("<|eot|>",))
        part = keep(ChatEncoder(tokenizer, rules=rules).encode([Chat("f", TURNS)]), Limits(1000))
        assert trained(Sample(part.ids.tolist(), part.labels.tolist()), tokenizer) == runs
    with pytest.raises(RecipeError, match=r"eot_tokens: '<\|no\|>' is 6 tokens"):
        ChatEncoder(tokenizer, rules=Rules(eot_tokens=("<|no|>",)))


def test_spaces_that_offsets_leave_out_belong_to_the_token() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for trims in (False, True):
        tokenizer = make_tokenizer(template)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
        chats = [Chat("f", TURNS)]
        part = keep(ChatEncoder(tokenizer).encode(chats), Limits(1000))
        sample = Sample(part.ids.tolist(), part.labels.tolist())
        assert trained(sample, tokenizer) == ["Yo.<|im_end|>", "So.<|im_end|>"]


# --- how it is found -----------------------------------------------------------------------------


def test_a_conversation_is_rendered_once_after_the_first_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    render = Template._render

    def counting(self: Template, conversations: Any, *args: Any, **options: Any) -> Any:
        counted.append(len(conversations))
        return render(self, conversations, *args, **options)

    encoder = ChatEncoder(make_tokenizer(CHATML))
    encoder.encode([Chat("f", TURNS)])
    monkeypatch.setattr(Template, "_render", counting)
    encoder.encode([Chat("f", TURNS)] * 20)
    assert counted == [20]


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.text(max_size=12)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([MARKED, LLAMA3]),
)
@settings(deadline=None, max_examples=150)
def test_found_and_marked_turns_are_the_same(turns: list[tuple[str, str]], template: str) -> None:
    """Marks in a template, and the same template without them, give the same masks."""
    messages = [{"role": role, "content": text} for role, text in turns]
    if template is not MARKED:
        marked = template.replace(
            "m['content'] | trim + '<|im_end|>' }}",
            "'' }}{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] | trim + '<|im_end|>' }}{% endif %}",
        )
        plain = template
    else:
        marked, plain = MARKED, CHATML
    (a,), (b,) = (
        ChatEncoder(make_tokenizer(t)).encode([Chat("f", messages)]) for t in (marked, plain)
    )
    assert (a.ids, a.spans) == (b.ids, b.spans)
    tokenizer = make_tokenizer(marked)
    whole = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole["input_ids"] == a.ids
    # transformers also counts a token that begins in the header and reaches into the answer
    mine = [any(x <= i < y for x, y in a.spans) for i in range(len(a.ids))]
    pairs = list(zip(mine, map(bool, whole["assistant_masks"]), strict=True))
    assert all(theirs for own, theirs in pairs if own)
    double = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert all(own or a.ids[i] == double for i, (own, theirs) in enumerate(pairs) if theirs)


def test_thoughts_that_a_template_drops_and_calls_are_no_obstacle() -> None:
    tokenizer = tokenizer_for(THINKER, "", None, "<|im_end|>")
    call = {"function": {"name": "f", "arguments": {"q": "<|im_start|>"}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nt", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "k"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "k"},
    ]
    (tokens,) = ChatEncoder(tokenizer).encode([Chat("f", messages)])
    assert [tokenizer.decode(tokens.ids[a:b]) for a, b in tokens.spans] == [
        't\n<tool_call>\n{"name": "f", "arguments": {"q": "<|im_start|>"}}\n</tool_call><|im_end|>',
        "k<|im_end|>",
        "<|im_end|>",
    ]
