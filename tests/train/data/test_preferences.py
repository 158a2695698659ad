"""Rows of preferences: what each type says, its tokens, its limits, and its place in the cache."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import Sample, Samples, prepare
from fusewright.train.data.preferences.examples import Examples
from fusewright.train.data.prepare import _work
from fusewright.train.data.readers.limits import require_contrast, warnings
from fusewright.train.recipe.keys.row_types import preference_types, type_problem
from fusewright.train.recipe.recipe import Recipe

from ..conftest import make_tokenizer
from .preference_rows import TOKENIZER, assistant, examples, prepared, recipe, texts, user
from .templates import THINKER

DPO: dict[str, Any] = {"rl": "dpo"}
KTO: dict[str, Any] = {"rl": "kto"}
GRPO: dict[str, Any] = {"rl": "grpo"}
PRM: dict[str, Any] = {"process_reward_model": True}

ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
END = "<|im_end|>"
PAIR = {"chosen": "Good.", "rejected": "Bad."}
TALK = {
    "chosen": [user("Why?"), assistant("Good.")],
    "rejected": [user("Why?"), assistant("Bad.")],
}

PAIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "messages": ("chat_template.default", {"messages": [user("Why?")], **PAIR}, ASKED),
    "a question": ("chat_template", {"messages": "Why?", **PAIR}, ASKED),
    "one message each": (
        "chat_template",
        {"messages": [user("Why?")], "chosen": assistant("Good."), "rejected": assistant("Bad.")},
        ASKED,
    ),
    "lists of one message": (
        "chat_template",
        {"prompt": [user("Why?")], "chosen": [assistant("Good.")],
         "rejected": [assistant("Bad.")]},
        ASKED,
    ),
    "answers that repeat the prompt": ("chat_template", {"prompt": [user("Why?")], **TALK}, ASKED),
    "answers that repeat a question": ("chat_template", {"prompt": "Why?", **TALK}, ASKED),
    "answers that repeat all but the system message": (
        "chat_template",
        {"messages": [{"role": "system", "content": "Be brief."}, user("Why?")], **TALK},
        SYSTEM + ASKED,
    ),
    "a field of supervised training": (
        "chat_template", {"prompt": "Why?", "messages": TALK["chosen"], **TALK}, ASKED,
    ),
    "no prompt but what both begin with": ("chat_template", TALK, ASKED),
    "a system message in a field": (
        "chat_template", {"system": "Be brief.", **TALK}, SYSTEM + ASKED,
    ),
    "whole conversations": ("chat_template.argilla", TALK, ASKED),
    "whole conversations, by another name": ("chat_template.argilla_chat", TALK, ASKED),
    "plain text": ("chat_template", {"prompt": "Why? ", **PAIR}, "Why? "),
    "passed through": ("passthrough", {"prompt": "Why? ", **PAIR}, "Why? "),
    "chatml": ("chatml", {"instruction": "Why?", **PAIR}, ASKED),
    "chatml with a system message": (
        "chatml", {"input": "Why?", "system": "Be brief.", **PAIR}, SYSTEM + ASKED,
    ),
    "chatml, other names": (
        "chatml.argilla",
        {"instruction": "Why?", "chosen_response": "Good.", "rejected_response": "Bad."},
        ASKED,
    ),
    "chatml.intel": ("chatml.intel", {"question": "Why?", "prompt": "no", **PAIR}, ASKED),
    "chatml.icr": ("chatml.icr", {"input": "Why?", "prompt": "no", **PAIR}, ASKED),
    "chatml.prompt_pairs": ("chatml.prompt_pairs", {"prompt": "Why?", **PAIR}, ASKED),
    "chatml.ultra": ("chatml.ultra", {"prompt": "Why?", **TALK}, ASKED),
    "chatml.argilla_chat": ("chatml.argilla_chat", TALK, ASKED),
    "chatml, the question in the answers alone": ("chatml", TALK, ASKED),
    "chatml, the question in the better answer alone": (
        "chatml.ultra", {**TALK, "rejected": "Bad."}, ASKED,
    ),
    "llama3, the question in the answers alone": ("llama3.icr", TALK, LLAMA),
    "llama3": ("llama3", {"prompt": "Why?", **PAIR}, LLAMA),
    "llama3.ultra": ("llama3.ultra", {"prompt": "Why?", **TALK}, LLAMA),
    "llama3.icr": ("llama3.icr", {"input": "Why?", **PAIR}, LLAMA),
    "a reward model's": (
        "bradley_terry.chat_template", {"input": "Why?", "system": "", **PAIR}, ASKED,
    ),
    "a reward model's, in Llama's form": (
        "bradley_terry.llama3.icr", {"input": "Why?", **PAIR}, LLAMA,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, tmp_path: Path) -> None:
    kind, row, prompt = PAIRS[name]
    (example,) = examples(tmp_path, [row], DPO, type=kind)
    end = "<|eot_id|>" + END if prompt is LLAMA else END
    assert texts(example) == {
        "prompt_ids": prompt, "chosen_ids": "Good." + end, "rejected_ids": "Bad." + end
    }  # fmt: skip


def test_every_type_of_pairs_is_tried() -> None:
    tried = {kind.removesuffix(".default") for kind, _, _ in PAIRS.values()}
    same = {kind for kind in preference_types("pairs") if kind.startswith("llama3.")}
    assert set(preference_types("pairs")) - same <= tried


def test_fields_and_roles_have_the_names_that_the_recipe_says(tmp_path: Path) -> None:
    row = {
        "talk": [{"who": "person", "says": "Why?"}],
        "yes": {"who": "bot", "says": "Good."},
        "no": "Bad.",
    }
    names: dict[str, Any] = {
        "field_messages": "talk", "field_chosen": "yes", "field_rejected": "no",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"user": ["person"], "assistant": ["bot"]},
    }  # fmt: skip
    (example,) = examples(tmp_path, [row], DPO, type="chat_template.default", **names)
    assert texts(example)["prompt_ids"] == ASKED
    assert texts(example)["chosen_ids"] == "Good." + END


def test_a_type_that_is_spelled_out(tmp_path: Path) -> None:
    row = {"q": "Why?", "who": "Bo", "a": "Good.", "b": "Bad."}
    form = {
        "field_prompt": "q", "field_system": "who", "field_chosen": "a", "field_rejected": "b",
        "prompt_format": "{system} asks: {prompt}\n", "chosen_format": "+ {chosen}",
        "rejected_format": "- {rejected}",
    }  # fmt: skip
    (example,) = examples(tmp_path, [row], DPO, type=form)
    assert texts(example) == {
        "prompt_ids": "Bo asks: Why?\n", "chosen_ids": "+ Good." + END,
        "rejected_ids": "- Bad." + END,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"type\.chosen_format: only \{chosen\} can be filled in"):
        examples(tmp_path, [row], DPO, type={**form, "chosen_format": "{answer}"})


def test_a_prompt_that_both_texts_begin_with_ends_at_a_word(tmp_path: Path) -> None:
    row = {
        "chosen": "Human: Why?\n\nAssistant: Because.",
        "rejected": "Human: Why?\n\nAssistant: Be.",
    }
    (example,) = examples(tmp_path, [row], DPO)
    assert texts(example) == {
        "prompt_ids": "Human: Why?\n\nAssistant:", "chosen_ids": " Because." + END,
        "rejected_ids": " Be." + END,
    }  # fmt: skip


def test_conversations_differ_in_the_last_answer_only(tmp_path: Path) -> None:
    before = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*before, assistant("d")], "rejected": [*before, assistant("e")]}
    expected = TOKENIZER.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    for kind in ("chat_template", "chat_template.argilla", "chatml.argilla_chat"):
        (example,) = examples(tmp_path, [row], DPO, type=kind)
        assert texts(example)["prompt_ids"] == expected
        assert texts(example)["chosen_ids"] == "d" + END
    (example,) = examples(tmp_path, [{"prompt": "a", **row}], DPO, type="chatml.ultra")
    assert texts(example)["prompt_ids"] == expected


def test_a_text_may_be_its_own_answer(tmp_path: Path) -> None:
    (example,) = examples(tmp_path, [{"prompt": "a", "chosen": "a", "rejected": "b"}], DPO)
    assert texts(example)["prompt_ids"] == "a"


def test_an_answer_may_have_several_messages(tmp_path: Path) -> None:
    row = {
        "chosen": [user("Why?"), assistant("a"), assistant("b")],
        "rejected": [user("Why?"), assistant("a"), assistant("c")],
    }
    (example,) = examples(tmp_path, [row], DPO)
    assert texts(example) == {
        "prompt_ids": ASKED,
        "chosen_ids": "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "rejected_ids": "a<|im_end|>\n<|im_start|>assistant\nc<|im_end|>",
    }  # fmt: skip


@pytest.mark.parametrize("template", ["chatml", "thinker"])
def test_the_prompt_is_what_inference_gives_and_a_prefix_of_the_whole(
    template: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(THINKER) if template == "thinker" else TOKENIZER
    before = [user(" Why?\n\n"), assistant("Hm."), user("Say  it.")]
    answers = [" Good. \n\n", "Bad <é> 😀"]
    row = {"messages": before, "chosen": answers[0], "rejected": answers[1]}
    (example,) = examples(tmp_path, [row], DPO, tokenizer=tokenizer)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        talk = tokenizer.apply_chat_template([*before, assistant(answer)], tokenize=False)
        whole = tokenizer(talk, add_special_tokens=False)["input_ids"]
        ids = example["prompt_ids"] + example[f"{name}_ids"]
        assert ids == whole[: len(ids)]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole[len(ids) :]).strip() == ""
    asked = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example["prompt_ids"]) == asked


def test_a_token_that_reaches_into_the_prompt_is_the_answers(tmp_path: Path) -> None:
    # "\n" ends the header; with another one behind it, both are one token
    row = {"messages": [user("Why?")], "chosen": "\nGood.", "rejected": "Bad."}
    (example,) = examples(tmp_path, [row], DPO)
    assert texts(example) == {
        "prompt_ids": ASKED[:-1], "chosen_ids": "\n\nGood." + END, "rejected_ids": "\nBad." + END,
    }  # fmt: skip


def test_tools_are_in_the_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    row = {"messages": [user("Why?")], "tools": tools, **PAIR}
    (example,) = examples(tmp_path, [row], DPO, tokenizer=make_tokenizer(THINKER))
    assert "look_up" in TOKENIZER.decode(example["prompt_ids"])


def test_a_text_ends_once_and_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b<|im_end|>", "rejected": "c"}
    (example,) = examples(tmp_path, [row], DPO)
    assert texts(example)["chosen_ids"] == "b" + END
    tokenizer = make_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    (example,) = examples(tmp_path, [row], DPO, tokenizer=tokenizer)
    assert texts(example)["prompt_ids"] == "<|im_start|>a"
    assert texts(example)["rejected_ids"] == "c" + END


# --- other kinds of rows --------------------------------------------------------------------------

LABELLED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "plain text": ("chat_template", {"prompt": "Why? ", "completion": "Good."}, "Why? "),
    "messages": (
        "chat_template", {"prompt": [user("Why?")], "completion": [assistant("Good.")]}, ASKED,
    ),
    "one conversation": (
        "chat_template", {"completion": [user("Why?"), assistant("Good.")]}, ASKED,
    ),
    "chatml.argilla": ("chatml.argilla", {"instruction": "Why?", "completion": "Good."}, ASKED),
    "chatml.intel": ("chatml.intel", {"question": "Why?", "completion": "Good."}, ASKED),
    "chatml.ultra": ("chatml.ultra", {"prompt": "Why?", "completion": "Good."}, ASKED),
    "llama3.ultra": ("llama3.ultra", {"prompt": "Why?", "completion": "Good."}, LLAMA),
    "chatml.argilla_chat": (
        "chatml.argilla_chat", {"completion": [user("Why?"), assistant("Good.")]}, ASKED,
    ),
    "spelled out": (
        {"field_prompt": "q", "field_completion": "a", "field_label": "label",
         "prompt_format": "{system}{prompt}\n"},
        {"q": "Why?", "a": "Good."}, "Why?\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [True, False, 1])
def test_labelled_answers(name: str, label: Any, tmp_path: Path) -> None:
    kind, row, prompt = LABELLED[name]
    (example,) = examples(tmp_path, [{**row, "label": label}], KTO, type=kind)
    end = "<|eot_id|>" + END if prompt is LLAMA else END
    assert texts(example) == {
        "prompt_ids": prompt, "completion_ids": "Good." + end, "label": bool(label)
    }  # fmt: skip


def test_prompts_keep_the_other_fields(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user("Why?")], "answer": "é", "tests": ["a", {"b": 1}]},
        {"prompt": [user("How?")], "hard": True},
    ]
    first, second = examples(tmp_path, rows, GRPO)
    ids = first.pop("prompt_ids")
    assert first == {
        "prompt": [user("Why?")],
        "answer": "é",
        "tests": ["a", {"b": 1}],
        "hard": None,
    }
    assert TOKENIZER.decode(ids) == ASKED
    assert second["answer"] is None
    assert second["hard"] is True


def test_prompts_as_text_and_in_another_field(tmp_path: Path) -> None:
    (plain,) = examples(tmp_path, [{"prompt": "Why?"}], GRPO)
    assert (plain["prompt"], TOKENIZER.decode(plain["prompt_ids"])) == ("Why?", "Why?")
    (asked,) = examples(tmp_path, [{"q": "Why?"}], GRPO, field_messages="q")
    assert asked["prompt"] == [user("Why?")]
    assert TOKENIZER.decode(asked["prompt_ids"]) == ASKED


def test_steps(tmp_path: Path) -> None:
    row = {"prompt": "2+3?", "completions": ["2+3=5", "so 6"], "labels": [True, False]}
    (example,) = examples(tmp_path, [row], PRM, type="stepwise_supervised")
    ids, labels = example["input_ids"], example["labels"]
    assert TOKENIZER.decode(ids) == "2+3?2+3=5\nso 6\n"
    ends = [i for i, token in enumerate(ids) if TOKENIZER.decode([token]) == "\n"]
    assert {i: label for i, label in enumerate(labels) if label != -100} == {
        ends[0]: 1, ends[1]: 0
    }  # fmt: skip
    (last,) = examples(
        tmp_path, [row], PRM, type="stepwise_supervised", train_on_last_step_only=True,
        step_separator="#", max_completion_length=20,
    )  # fmt: skip
    assert TOKENIZER.decode(last["input_ids"]) == "2+3?2+3=5#so 6#"
    assert [label for label in last["labels"] if label != -100] == [0]


def test_a_reward_model_reads_whole_sequences(tmp_path: Path) -> None:
    rows = prepared(tmp_path, [{"input": "Why?", **PAIR}], {"reward_model": True},
                    type="bradley_terry.chat_template").train  # fmt: skip
    assert isinstance(rows, Samples)
    (example,) = list(Examples(rows, "pairs", whole=True))
    assert texts(example) == {
        "chosen_ids": ASKED + "Good." + END, "rejected_ids": ASKED + "Bad." + END
    }  # fmt: skip


OWN = """
def short(cfg, **kwargs):
    assert cfg["rl"] == "grpo"
    def change(row, tokenizer=None):
        return {"prompt": [{"role": "user", "content": row["question"]}],
                "answer": row["answer"].split("####")[-1].strip()}
    return change, {"remove_columns": ["question"]}

def bare(cfg, **kwargs):
    return lambda row, tokenizer=None: None

def broken(cfg, **kwargs):
    return "no function"

def ends(cfg, **kwargs):
    raise SystemExit(0)

def ends_at_a_row(cfg, **kwargs):
    return lambda row, tokenizer=None: exit(0)
"""


def test_a_function_changes_rows(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"question": "Why?", "answer": "since #### 7", "id": 1}]
    named = f"{tmp_path}/own.py"
    (example,) = examples(tmp_path, rows, GRPO, type=f"{named}:short")
    del example["prompt_ids"]
    assert example == {"prompt": [user("Why?")], "answer": "7", "id": 1}
    with pytest.raises(DataError, match=r"line 1: .*own\.py:bare must return an object, not null"):
        examples(tmp_path, rows, GRPO, type=f"{named}:bare")
    with pytest.raises(RecipeError, match="must return a function that changes a row, not text"):
        examples(tmp_path, rows, GRPO, type=f"{named}:broken")
    with pytest.raises(
        DataError, match=r"line 1: .*own\.py:short raised KeyError at own\.py:\d+: 'q"
    ):
        examples(tmp_path, [{}], GRPO, type=f"{named}:short")
    with pytest.raises(RecipeError, match=r"own\.py:ends called sys\.exit\(0\) at own\.py:\d+"):
        examples(tmp_path, rows, GRPO, type=f"{named}:ends")
    with pytest.raises(DataError, match=r"line 1: .*:ends_at_a_row called sys\.exit\(0\) at own"):
        examples(tmp_path, rows, GRPO, type=f"{named}:ends_at_a_row")


IMPORTING = """
from told_apart import ANSWER

def change(cfg, **kwargs):
    return lambda row, tokenizer=None: {"prompt": ANSWER * cfg["micro_batch_size"]}
"""


def test_rows_that_a_function_changes_are_prepared_by_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_import.py").write_text(IMPORTING)
    monkeypatch.setitem(sys.modules, "told_apart", told := ModuleType("told_apart"))
    cache = tmp_path / "cache"
    found = []
    for answer, size in (("a", 1), ("b", 1), ("b", 2), ("b", 2)):
        told.ANSWER = answer  # type: ignore[attr-defined]
        keys = {**GRPO, "dataset_prepared_path": str(cache), "micro_batch_size": size}
        for name in [name for name in sys.modules if name.startswith("_of_recipe_")]:
            del sys.modules[name]  # another process
        made = prepared(tmp_path, [{"q": 1}], keys, type=f"{tmp_path}/own_import.py:change")
        assert isinstance(made.train, Samples)
        assert TOKENIZER.decode(made.train[0].input_ids) == answer * size
        found.append(made.fingerprint)
    assert not cache.exists()
    assert len(set(found)) == 3
    assert found[2] == found[3]  # so that a run can be resumed


def test_processes_of_a_run_share_the_rows_that_a_function_has_changed(tmp_path: Path) -> None:
    (tmp_path / "own_random.py").write_text(RANDOM)
    whole = recipe(tmp_path, [{"q": 1}], GRPO, {"type": f"{tmp_path}/own_random.py:change"})
    first = prepare(whole, TOKENIZER)
    assert isinstance(first.train, Samples)
    same = whole.model_copy(update={"dataset_prepared_path": str(first.train.path.parent.parent)})
    second = prepare(same, TOKENIZER, shared=True)
    assert second.train[0] == first.train[0]
    assert second.fingerprint == first.fingerprint
    assert prepare(same, TOKENIZER).fingerprint != first.fingerprint


RANDOM = """
import uuid

def change(cfg, **kwargs):
    return lambda row, tokenizer=None: {"prompt": str(uuid.uuid4())}
"""


# --- limits, warnings, the cache ------------------------------------------------------------------


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    def row(*sizes: int) -> dict[str, str]:
        return dict(zip(("prompt", "chosen", "rejected"), ("x" * n for n in sizes), strict=True))

    rows = [row(5, 4, 4), row(5, 40, 4), row(5, 4, 40), row(60, 4, 4), row(19, 4, 3)]
    keys = {**DPO, "sequence_len": 30}
    dropped = prepared(tmp_path, rows, keys)
    assert dropped.counts["too_long"] == 3
    assert dropped.counts["train_samples"] == 2
    limited = prepared(tmp_path, rows, {**keys, "max_prompt_len": 10})
    assert limited.counts["train_samples"] == 1
    cut = {**keys, "max_prompt_len": 10, "excess_length_strategy": "truncate"}
    found = examples(tmp_path, rows, cut)
    sizes = [[len(e[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")] for e in found]
    assert sizes == [[5, 5, 5], [5, 25, 5], [5, 5, 25], [10, 5, 5], [10, 5, 4]]
    assert prepared(tmp_path, rows, cut).counts["truncated"] == 4
    # without a limit of its own, a prompt can leave no room for answers
    kept = prepared(tmp_path, rows, {**keys, "excess_length_strategy": "truncate"})
    assert kept.counts["nothing_to_train"] == 1
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: 46 tokens, and sequence_len is 30"):
        prepared(tmp_path, rows, {**keys, "excess_length_strategy": "raise"})
    keys |= {"max_prompt_len": 10, "excess_length_strategy": "raise"}
    with pytest.raises(DataError, match="line 1: the prompt has 19 tokens, and max_prompt_len is"):
        prepared(tmp_path, rows[4:], keys)
    with pytest.raises(DataError, match=r"of 1, 1 are longer than 30 tokens \(sequence_len\)"):
        prepared(tmp_path, rows[3:4], {**DPO, "sequence_len": 30})


def test_answers_that_are_cut_are_counted(tmp_path: Path) -> None:
    steps = [{"prompt": "ab", "completions": [step, step], "labels": [True, False]}
             for step in ("abc", "abcdefgh")]  # fmt: skip
    short = prepared(tmp_path, steps, PRM, type="stepwise_supervised", max_completion_length=12)
    assert (short.counts["too_long"], short.counts["truncated"]) == (1, 1)
    assert short.counts["train_samples"] == 2
    long = prepared(
        tmp_path, steps, {**PRM, "sequence_len": 8, "excess_length_strategy": "truncate"},
        type="stepwise_supervised", max_completion_length=12,
    )  # fmt: skip
    assert long.counts["too_long"] == 2  # each of them once
    pair = {"prompt": "ab", "chosen": "abcdefgh", "rejected": "abcdefxy"}
    cut = {**DPO, "sequence_len": 8, "excess_length_strategy": "truncate"}
    rows = [pair, {"prompt": "ab", "chosen": "c", "rejected": "d"}]
    assert prepared(tmp_path, rows, cut).counts["equal_answers"] == 1
    assert prepared(tmp_path, rows, DPO).counts.get("equal_answers", 0) == 0


def test_the_end_of_a_prompt_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "abcdefgh?", "chosen": "y", "rejected": "n"}
    keys = {**DPO, "max_prompt_len": 4, "excess_length_strategy": "truncate"}
    (example,) = examples(tmp_path, [row], keys)
    assert texts(example)["prompt_ids"] == "fgh?"
    # of a prompt alone the text is used, which cannot be cut
    keys = {**GRPO, "max_prompt_len": 4, "excess_length_strategy": "truncate"}
    found = prepared(tmp_path, [{"prompt": "abcdefgh?"}, {"prompt": "abc?"}], keys)
    assert found.counts["too_long"] == 1
    assert found.counts["train_samples"] == 1


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "a", **PAIR}
    empty = [{**good, "prompt": " "}, {**good, "chosen": ""}, {**good, "rejected": "\n"},
             {"prompt": [user("")], **PAIR}]  # fmt: skip
    found = prepared(tmp_path, [good, *empty], DPO)
    assert found.counts["empty"] == 4
    (said,) = warnings(found.counts, found.first)
    assert said.startswith("warning: 4 rows have an empty prompt or answer and are left out (the")
    assert said.endswith("rows.jsonl, line 2)")
    found = prepared(tmp_path, [good, empty[0]], DPO)
    (said,) = warnings(found.counts, found.first)
    assert said.startswith("warning: 1 row has an empty prompt or answer and is left out (")
    for row in empty:
        with pytest.raises(DataError, match="line 1: the prompt or an answer is empty: leave the"):
            prepared(tmp_path, [row], {**DPO, "excess_length_strategy": "raise"})
        with pytest.raises(DataError, match="of 1, 1 have an empty prompt or answer; name"):
            prepared(tmp_path, [row], DPO)
    form = {"prompt": "a", "chosen": "", "rejected": "b"}
    with pytest.raises(DataError, match="1 have an empty prompt or answer"):
        prepared(tmp_path, [form], DPO, type="chatml")


def test_warnings(tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (said,) = warnings(prepared(tmp_path, [same], DPO).counts)
    assert said.startswith("warning: 1 row has the same text as chosen and as rejected answer")
    marked = {"prompt": "a<|im_end|>", **PAIR}
    (said,) = warnings(prepared(tmp_path, [marked], DPO).counts)
    assert "special tokens in user, tool or prompt text" in said
    assert warnings(prepared(tmp_path, [{"prompt": "a", **PAIR}], DPO, type="chatml").counts) == []
    one = {"prompt": "a", "completion": "b", "label": True}
    (said,) = warnings(prepared(tmp_path, [one, one], KTO).counts)
    assert said == "warning: all 2 answers are desirable: KTO compares both kinds"
    assert warnings(prepared(tmp_path, [one, {**one, "label": False}], KTO).counts) == []


def test_rows_without_anything_to_compare_are_refused(tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    one = {"prompt": "a", "completion": "b", "label": True}
    for rows, keys, said in (
        ([same, same], DPO, "rows.jsonl, line 1: the chosen and the rejected answer are the same"),
        ([one, one], KTO, "line 1: this answer and all others of 2 are desirable, and KTO learns"),
        ([{**one, "label": False}] * 2, KTO, "undesirable, .* add rows whose label is true"),
    ):
        found = prepared(tmp_path, rows, keys)
        with pytest.raises(DataError, match=said):
            require_contrast(found.counts, found.first)
    for rows, keys in (
        ([same, {**same, "rejected": "c"}], DPO), ([one, {**one, "label": False}], KTO),
        ([{"prompt": "a"}], GRPO),
    ):  # fmt: skip
        found = prepared(tmp_path, rows, keys)
        require_contrast(found.counts, found.first)


def test_a_template_must_end_answers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    rows = [{"messages": [user("a")], **PAIR}]
    with pytest.raises(DataError, match=r"no row trains '<\|im_end\|>'"):
        prepared(tmp_path, rows, {**DPO, "eot_tokens": ["<|im_end|>"]}, tokenizer)


def test_a_reward_model_need_not_learn_to_stop(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    rows = [{"messages": [user("a")], **PAIR}]
    with pytest.raises(DataError, match=r"no row trains '<\|im_end\|>'"):
        prepared(tmp_path, rows, DPO, tokenizer)
    assert prepared(tmp_path, rows, {"reward_model": True}, tokenizer).counts["rows"] == 1


def test_rows_are_cached_and_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}", **PAIR} for i in range(10)]
    keys = {**DPO, "dataset_prepared_path": str(tmp_path / "kept"), "val_set_size": 4}
    first = prepared(tmp_path, rows, keys)
    second = prepared(tmp_path, rows, keys)
    assert isinstance(first.train, Samples)
    assert isinstance(second.train, Samples)
    assert second.train.path == first.train.path
    assert list(second.train) == list(first.train)
    assert (len(first.train), len(first.validation["validation"])) == (6, 4)
    others = (
        {"sequence_len": 100}, {"max_prompt_len": 50}, {"rl": None, "reward_model": True},
        {"default_system_message": "Be brief."},
    )  # fmt: skip
    prints = {prepared(tmp_path, rows, {**keys, **other}).fingerprint for other in others}
    # a reward model reads the same rows
    assert prints - {first.fingerprint} != set()
    assert len(prints | {first.fingerprint}) == 5
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert prepared(tmp_path, swapped, keys).fingerprint != first.fingerprint


def test_duplicates_are_equal_in_all(tmp_path: Path) -> None:
    keys = {"dataset_exact_deduplication": True}
    row = {"prompt": "a", "completion": "b", "label": True}
    found = prepared(tmp_path, [row, row, {**row, "label": False}], {**KTO, **keys})
    assert found.counts["duplicates"] == 1
    prompts = [{"prompt": "a", "x": 1}, {"prompt": "a", "x": 2}, {"prompt": "a", "x": 1}]
    kept = examples(tmp_path, prompts, {**GRPO, **keys})
    assert [example["x"] for example in kept] == [1, 2]


def test_other_processes_prepare_the_same(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    rows = [("rows.jsonl, line 1", {"question": "Why?", "answer": "7"})]
    for keys, kind, batch in (
        (GRPO, f"{tmp_path}/own.py:short", rows),
        (DPO, "chatml", [("rows.jsonl, line 1", {"prompt": "a", **PAIR})]),
    ):
        whole = recipe(tmp_path, [], keys, {"type": kind})
        work = _work(whole.datasets[0], "datasets", whole, TOKENIZER, "2026-01-01", Path("images"))
        here, there = work.part(batch), pickle.loads(pickle.dumps(work)).part(batch)
        assert here.ids.tolist() == there.ids.tolist()
        assert here.labels.tolist() == there.labels.tolist()
        assert here.extra == there.extra


def test_rows_may_come_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({k: [v] for k, v in TALK.items()}), path)
    whole = recipe(tmp_path, [], DPO, {"path": str(path)})
    train = prepare(whole, TOKENIZER).train
    assert isinstance(train, Samples)
    assert texts(Examples(train, "pairs")[0])["prompt_ids"] == ASKED
    assert len(Examples(train, "pairs")[:1]) == 1


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("chat_template.default", "pairs", None),
        ("llama3.ultra.load", "labelled", None),
        ("own.change", "prompts", None),
        ("a/b.py:change", "pairs", None),
        ("chatml.intl", "pairs", "'chatml.intl' is not a type of such rows; did you mean chatml.i"),
        ("chatml.icr", "labelled", "is not a type of such rows"),
        ("alpaca", "pairs", "'alpaca' is not a type of such rows; there are chat_template, "),
        ("user_defined.default", "pairs", "write the type as keys"),
    ],
)
def test_types(name: str, rows: str, said: str | None) -> None:
    problem = type_problem(name, rows)
    assert problem is None if said is None else said in (problem or "")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=st.tuples(TEXT, TEXT, TEXT), most=st.integers(4, 60), prompt=st.integers(2, 30))
def test_what_is_kept_is_a_part_of_what_was_given(
    row: tuple[str, str, str], most: int, prompt: int
) -> None:
    keys = {
        "base_model": "x", "rl": "dpo", "sequence_len": most, "max_prompt_len": prompt,
        "excess_length_strategy": "truncate", "datasets": [{"path": "a/b"}],
    }  # fmt: skip
    whole = Recipe.model_validate(keys)
    work = _work(whole.datasets[0], "datasets", whole, TOKENIZER, "2026-01-01", Path("images"))
    names = ("prompt", "chosen", "rejected")
    part = work.part([("f, line 1", dict(zip(names, row, strict=True)))])
    given_ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in row]
    if not len(part.lengths):
        assert part.counts["empty"] + part.counts["nothing_to_train"] == 1
        return
    sample = Sample(part.ids.tolist(), part.labels.tolist())
    example = Examples([sample], "pairs")[0]
    kept = [example[f"{name}_ids"] for name in names]
    assert given_ids[0][len(given_ids[0]) - len(kept[0]) :] == kept[0]
    assert len(kept[0]) <= prompt
    for ids, answer in zip(given_ids[1:], kept[1:], strict=True):
        ended = [*ids, *([2] if ids[-1] != 2 else [])]
        assert ended[: len(answer)] == answer
        assert 0 < len(answer) <= most - len(kept[0])
    cut = any(len(kept[0]) + len(k) == most for k in kept[1:]) or len(kept[0]) < len(given_ids[0])
    assert cut or not part.counts["truncated"]
