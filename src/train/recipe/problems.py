"""The problems of a recipe as messages: which key, where, and what to write instead."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ...errors import nearest
from .keys.base import Keys, aliases, extra_of, nested
from .recipe import Recipe
from .secret_values import hide

Loc = tuple[str | int, ...]
"""The path of a value, e.g. ``("datasets", 0, "path")``."""

_EXPECTED = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "string": "text",
    "list": "a list", "dict": "keys and values", "model": "keys and values",
    "value": "a number", "too": "a list that is not empty",
}  # fmt: skip

OTHER_NAMES = {
    name: key
    for key, names in {
        "sequence_len": "max_seq_length max_seq_len seq_len seq_length block_size "
        "cutoff_len context_length",
        "micro_batch_size": "per_device_train_batch_size train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
        "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
        "num_epochs": "num_train_epochs",
        "base_model": "model model_name_or_path model_name model_id",
        "tokenizer_config": "tokenizer tokenizer_name",
        "learning_rate": "lr",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "seed": "data_seed random_state",
        "bf16": "precision",
        "adapter: lora": "use_peft use_lora finetuning_type",
        "lora_r": "r rank",
        "lora_alpha": "alpha",
        "lora_target_modules": "target_modules lora_target",
        "peft_use_dora": "use_dora",
        "bnb_config_kwargs": "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        "attn_implementation: flash_attention_2": "use_flash_attention_2",
        "datasets": "dataset_name dataset_path data train_file",
        "sample_packing": "packing packing_strategy",
        "train_on_inputs: false": "assistant_only_loss completion_only_loss",
        "logging_steps": "logging_strategy",
        "use_wandb: true": "report_to",
        "wandb_name": "run_name",
        "datasets: [{images_dir: FOLDER}]": "image_folder media_dir",
    }.items()
    for name in names.split()
}
"""Names that TRL, PEFT, transformers and others have -> the recipe's, maybe with the value."""

_IMAGE_COLUMNS = frozenset(
    f"{before}_{after}"
    for word in ("image", "images")
    for before, after in ((word, "column"), (word, "field"), (word, "key"), ("field", word))
)
"""What others call the key that names the field, which has one name here."""

_MANY = 15
"""More values than this are not listed in a message."""


def explained(error: ValidationError, values: Any) -> list[tuple[Loc, str]]:
    """Pydantic's errors for ``values`` as messages; the branches of a union become one line."""
    grouped: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_place(detail, values), []).append(detail)
    inner = {loc[:n] for loc in grouped for n in range(1, len(loc))}
    # a mapping that has problems inside is not also "not a text"
    return [(loc, _words(loc, details)) for loc, details in grouped.items() if loc not in inner]


def _place(detail: ErrorDetails, values: Any) -> Loc:
    """The part of the location that the recipe has; pydantic adds the names of union branches."""
    loc: list[str | int] = []
    for part in detail["loc"]:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            continue
        loc.append(part)
    if detail["type"] == "missing":
        loc.append(detail["loc"][-1])
    return tuple(loc)


def _words(loc: Loc, details: list[ErrorDetails]) -> str:
    kind, value = details[0]["type"], hide({str(loc[-1]): details[0]["input"]})[str(loc[-1])]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        name = str(loc[-1])
        near = OTHER_NAMES.get(name) if len(loc) == 1 else None
        if name in _IMAGE_COLUMNS:
            return "is not a key of a recipe: a row's field of images is 'images' or 'image'"
        near = near or nearest_key(model_at(loc[:-1]), name)
        return f"is not a key of a recipe{_meant(near)}"
    expectations = [str(detail.get("ctx", {}).get("expected", "")) for detail in details]
    names = [name for expected in expectations for name in re.findall(r"'([^']*)'", expected)]
    near = _nearest_value(loc, str(value), names)
    if len(names) > _MANY:
        return (
            f"must be one of {len(names)} names (fusewright schema lists them), "
            f"not {_quoted(value)}{_meant(near)}"
        )
    alternatives: list[str] = []
    for detail, expected in zip(details, expectations, strict=True):
        word = expected or _EXPECTED.get(detail["type"].split("_")[0])
        alternatives.append(word or detail["msg"].removeprefix("Input should be "))
    return f"must be {' or '.join(dict.fromkeys(alternatives))}, not {_quoted(value)}{_meant(near)}"


def _quoted(value: Any) -> str:
    """A value as in Python, cut where it is long."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxstring, cut.maxother, cut.maxlong = 3, 200, 200, 100
    return cut.repr(value)


def _nearest_value(loc: Loc, value: str, names: list[str]) -> str | None:
    """The most similar of the allowed names, whether or not the case is right."""
    key = max((i for i, part in enumerate(loc) if isinstance(part, str)), default=0)
    field = model_at(loc[:key]).model_fields.get(str(loc[key]))
    special = extra_of(field).get("values", ()) if field else ()
    odd = {one["value"]: one["status"] for one in special}
    usable = {n.lower(): n for n in names if odd.get(n) != "not yet available"}
    value = value.lower()
    longer = [name for name in usable if value and name.startswith(value)]  # the plainest is first
    near = longer[0] if longer else nearest(value, usable)
    return None if near is None else usable[near]


def _meant(near: str | None) -> str:
    return f"; did you mean {near}?" if near else ""


def model_at(loc: Loc) -> type[Keys]:
    """The class whose keys are at ``loc``; ``Recipe`` for what is in no class."""
    model: type[Keys] = Recipe
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        inner = nested(field.annotation) if field else None
        model = inner or model
    return model


def nearest_key(model: type[Keys], name: str) -> str | None:
    """The key of this name in a group of keys that is read, or that with a similar name, if any."""
    for group, field in model.model_fields.items():
        inner = nested(field.annotation)
        read = extra_of(field).get("status", "honoured") == "honoured"
        if (
            inner is not None
            and read
            and not group.endswith("datasets")
            and name in inner.model_fields
        ):
            return f"{group}.{name}"
    return nearest(name, [*model.model_fields, *aliases(model)])


def listed(name: str, problems: list[tuple[Loc, str]], where: Mapping[Loc, str]) -> str:
    """All problems as one message, in the order of their lines, which ``where`` has by place."""
    order = {place: i for i, place in enumerate(where.values())}
    entries = []
    for loc, problem in problems:
        at = line_of(loc, where)
        text = f"{at}: " if at else ""
        entries.append((order.get(at, -1), f"{text}{'.'.join(map(str, loc))}: {problem}"))
    lines = [text for _, text in sorted(entries, key=lambda entry: entry[0])]
    if len(lines) == 1:
        return f"{name}, {lines[0]}"
    return "\n  ".join([f"{name} has {len(lines)} problems:", *lines])


def line_of(loc: Loc, where: Mapping[Loc, str]) -> str:
    """The line of a place, or of what it is in; empty if it has none."""
    return next((where[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in where), "")
