"""The types of rows that a recipe may name, a record each; and the names of rewards.

Data is read by what these say (``data/formats``, ``data/preferences``); lists, messages and checks
are derived from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import did_you_mean, nearest

# --- supervised rows -----------------------------------------------------------------------------

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


_CONCISE = (
    "Below is an instruction from a USER that describes a task, paired with an input that provides "
    "further context. The ASSISTANT writes a response that concisely and appropriately completes "
    "the request.\n\n",
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request.\n\n",
)


@dataclass(frozen=True)
class Style:
    """The text around the fields ``{system}``, ``{instruction}`` and ``{input}``.

    Attributes:
        system: how the system message is written, where there is one.
        turn: the prompt of a row with an input.
        bare: the prompt of a row without one.
    """

    system: str
    turn: str
    bare: str


STYLES = {
    "instruct": Style(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": Style(
        "SYSTEM: {system}\n",
        "USER: {instruction}\n{input}\nASSISTANT:",
        "USER: {instruction}\nASSISTANT:",
    ),
    "chatml": Style(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi": Style(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
    "tldr": Style(
        "{system}",
        "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
        "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
    ),
    "orca": Style(
        "### System:\n{system}\n",
        "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
        "### Human:\n{instruction}\n### Assistant:\n",
    ),
}


@dataclass(frozen=True)
class Fields:
    """The names of a row's fields; an empty one means that the row has no such field."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = ""


@dataclass(frozen=True)
class Wording:
    """How an instruction and its answer become text.

    Attributes:
        fields: where things are.
        style: the text around them.
        defaults: the system messages of rows with and without an input that have none themselves.
        answer: what every answer begins with, before the row's own.
    """

    fields: Fields
    style: Style
    defaults: tuple[str, str] = (_WITH_INPUT, _WITHOUT_INPUT)
    answer: str = ""


@dataclass(frozen=True)
class RowType:
    """A type of supervised rows.

    Attributes:
        name: what recipes call it: Axolotl's name; it may also end in ``.load`` or ``.default``.
        reader: what reads it, of ``data.formats.registry.READERS``.
        wording: for an instruction, how it becomes text.
    """

    name: str
    reader: str
    wording: Wording | None = None


def _instruction(
    name: str, style: str, fields: Fields = Fields(), *more: Any, **rest: Any
) -> RowType:
    return RowType(name, "instruction", Wording(fields, STYLES[style], *more, **rest))


def _in_each_style(name: str, fields: Fields, **rest: Any) -> list[RowType]:
    styles = {name: "instruct", **{f"{name}:{s}": s for s in ("instruct", "chat", "chatml", "phi")}}
    return [_instruction(kind, style, fields, **rest) for kind, style in styles.items()]


_NONE = ("", "")
_WITH_SYSTEM = Fields(system="system")
_ORCA = Fields("question", "", "response", "system_prompt")
_KD = "axolotl.integrations.kd.chat_template"

ROW_TYPES: dict[str, RowType] = {
    row_type.name: row_type
    for row_type in (
        RowType("chat_template", "conversation"),
        RowType("sharegpt", "conversation"),
        RowType("completion", "text"),
        RowType("pretrain", "streamed_text"),
        RowType("input_output", "segments"),
        RowType("prompt_completion", "prompt_completion"),
        RowType("alpaca.chat_template", "instruction_chat"),
        *_in_each_style("alpaca", Fields())[:4],
        _instruction("alpaca_instruct", "instruct"),
        _instruction("alpaca_instruct.load_no_prompt", "instruct", Fields(), _NONE),
        _instruction("alpaca_chat", "chat"),
        _instruction("alpaca_chat.load_qa", "chat", Fields("question", "", "answer"), _CONCISE),
        _instruction("alpaca_chat.load_no_prompt", "chat", Fields(), _NONE),
        _instruction("alpaca_w_system", "chat", _WITH_SYSTEM, _NONE),
        _instruction("alpaca_w_system.load_chat", "chat", _WITH_SYSTEM, _NONE),
        _instruction("alpaca_w_system.load_instruct", "instruct", _WITH_SYSTEM, _NONE),
        _instruction("alpaca_w_system.load_open_orca", "orca", _ORCA, _NONE),
        _instruction("alpaca_w_system.load_open_orca_chatml", "chatml", _ORCA, _NONE),
        *_in_each_style("alpaca", Fields())[4:],
        _instruction("alpaca_chat.load_concise", "chat", Fields(), _CONCISE),
        _instruction(
            "alpaca_chat.load_camel_ai", "chat", Fields("message_1", "", "message_2"), _CONCISE
        ),
        _instruction("summarizetldr", "tldr", Fields("article", "", "summary"), _NONE),
        *_in_each_style("gpteacher", Fields(output="response")),
        *_in_each_style("oasst", Fields("INSTRUCTION", "", "RESPONSE")),
        *_in_each_style("jeopardy", Fields("question", "category", "answer"), answer="what is "),
        *(RowType(name, "teacher") for name in (_KD, f"{_KD}.load_v2", f"{_KD}.load_legacy")),
    )
}
"""The types of supervised rows, by name."""

TEACHER_TYPES = tuple(t.name for t in ROW_TYPES.values() if t.reader == "teacher")
"""Those of chats with a teacher's log-probabilities."""

TYPES = tuple(name for name in ROW_TYPES if name not in TEACHER_TYPES)
"""All others, in the order in which messages list them."""

OTHER_TYPES = {
    name: kind
    for kind, names in {
        "chat_template": "chat chats messages conversation conversations openai chatml dialog "
        "dialogue",
        "alpaca": "instruction instructions instruct sft",
        "completion": "text raw plain",
        "prompt_completion": "prompt prompts",
    }.items()
    for name in names.split()
}
"""Names that other programs, or nobody, have for types of supervised rows -> the type."""

_LISTED = 8
"""Types that a message lists; docs/recipes.md has all."""


def no_type(name: str, known: Sequence[str], rows: str) -> str:
    """The message about a type that is none of ``known``, which ``rows`` may have."""
    begins = (kind for kind in known if name and kind.startswith(name))
    other = OTHER_TYPES.get(name.lower())
    near = other if other in known else nearest(name, known) or next(begins, None)
    if near is not None:
        return f"{name!r} is not a type of {rows}; did you mean {near}?"
    more = len(known) - _LISTED
    others = f" and {more} more, which docs/recipes.md lists" if more > 0 else ""
    return f"{name!r} is not a type of {rows}; there are {', '.join(known[:_LISTED])}{others}"


# --- rows of preferences -------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatForm:
    """How a conversation is written.

    Attributes:
        turn: a message; ``{role}`` and ``{content}`` are what it says.
        header: what the assistant's answer comes after.
        end: what ends it.
    """

    turn: str
    header: str
    end: str


_CHATML = ChatForm(
    "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"
)
_LLAMA3 = ChatForm(
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)


@dataclass(frozen=True)
class PreferenceType:
    """A type of rows of preferences.

    Attributes:
        name: what recipes call it: Axolotl's name.
        rows: what a row may be: ``pairs``, ``labelled``, ``prompts`` or ``steps``.
        form: how messages become text; None: the chat template writes them.
        prompts: the fields that may have the prompt, best first; none: the prompt is what the
            answer's conversation begins with; None: those of the dataset.
        whole: answers are conversations, whose last message is the answer.
    """

    name: str
    rows: tuple[str, ...]
    form: ChatForm | None = None
    prompts: tuple[str, ...] | None = None
    whole: bool = False


_PAIRS, _BOTH = ("pairs",), ("pairs", "labelled")
_ANY_PROMPT = ("prompt", "input", "question", "instruction")


def _in_form(family: str, form: ChatForm) -> list[PreferenceType]:
    return [
        PreferenceType(family, _BOTH, form, _ANY_PROMPT),
        PreferenceType(f"{family}.intel", _BOTH, form, ("question",)),
        PreferenceType(f"{family}.icr", _PAIRS, form, ("input",)),
        PreferenceType(f"{family}.argilla", _BOTH, form, ("instruction",)),
        PreferenceType(f"{family}.argilla_chat", _BOTH, form, ()),
        PreferenceType(f"{family}.prompt_pairs", _BOTH, form, ("prompt",)),
        PreferenceType(f"{family}.ultra", _BOTH, form, ("prompt",)),
    ]


PREFERENCE_TYPES: dict[str, PreferenceType] = {
    row_type.name: row_type
    for row_type in (
        PreferenceType("chat_template", (*_BOTH, "prompts")),
        PreferenceType("chat_template.argilla", _PAIRS, whole=True),
        PreferenceType("chat_template.argilla_chat", _PAIRS, whole=True),
        PreferenceType("passthrough", (*_BOTH, "prompts")),
        *_in_form("chatml", _CHATML),
        *_in_form("llama3", _LLAMA3),
        PreferenceType(
            "bradley_terry.chat_template", _PAIRS,
            prompts=("input", "prompt", "question", "instruction"),
        ),
        PreferenceType("bradley_terry.llama3.icr", _PAIRS, _LLAMA3, ("input",)),
        PreferenceType("stepwise_supervised", ("steps",)),
    )
}  # fmt: skip
"""The types of rows of preferences, by name; each may also end in ``.default``."""


def preference_types(rows: str) -> tuple[str, ...]:
    """The types whose rows may be ``rows``: ``pairs``, ``labelled``, ``prompts`` or ``steps``."""
    return tuple(name for name, t in PREFERENCE_TYPES.items() if rows in t.rows)


# --- rewards -------------------------------------------------------------------------------------

REWARDS = ("exact_match", "regex", "format", "length")
"""The rewards that need no code of the recipe's own."""

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|.+\.py:[A-Za-z_]\w*")
_BOUNDS = re.compile(r"(\d+-)?\d+")


def plain_type(name: str) -> str:
    """The name of a type without ``.load`` or ``.default`` at its end."""
    return name.removesuffix(".load").removesuffix(".default")


def is_function(name: str) -> bool:
    """Whether a name has the form of a Python function's: ``module.function``, ``PATH.py:name``."""
    return name.partition(":")[0] not in REWARDS and _FUNCTION.fullmatch(name) is not None


def is_function_type(name: str, rows: str) -> bool:
    """Whether the type of a dataset of ``rows`` is a Python function that changes them."""
    known = preference_types(rows)
    plain = plain_type(name)
    family = plain.split(".")[0] in {n.split(".")[0] for n in known}
    if plain in known or plain == "user_defined" or family:
        return False
    return is_function(name) and not nearest(plain, known)


def type_problem(name: str, rows: str) -> str | None:
    """What is wrong with the type of a dataset of ``rows``; None: nothing."""
    known = preference_types(rows)
    if plain_type(name) in known or is_function_type(name, rows):
        return None
    if plain_type(name) == "user_defined":
        return "write the type as keys (field_prompt, prompt_format, ...) instead of user_defined"
    return no_type(name, known, "such rows")


def reward_problem(name: str) -> str | None:
    """What is wrong with the name of a reward; None: nothing."""
    kind, colon, argument = name.partition(":")
    if kind == "regex":
        if not argument:
            return "needs a pattern: write regex:PATTERN"
        try:
            re.compile(argument)
        except re.error as error:
            return f"{argument!r} is not a regular expression: {error}"
    elif kind == "length":
        bounds = _BOUNDS.fullmatch(argument)
        low, _, high = argument.rpartition("-")
        if bounds is None or int(low or 0) > int(high) or int(high) == 0:
            return "needs a number of tokens: write length:MOST or length:LEAST-MOST"
    elif kind in REWARDS:
        if colon and not all(part.strip() for part in argument.split(",")):
            return f"has nothing after the colon: write {kind}, or {kind}:NAME"
    elif "/" in name and ".py:" not in name:
        return "a reward model cannot be named yet: use a Python function, as module.function"
    elif not is_function(name):
        hint = did_you_mean(kind, REWARDS) or f"there are {', '.join(REWARDS)}"
        return f"{name!r} is neither a reward ({hint}) nor a function, as module.function"
    return None
