"""The keys themselves: each explains itself, has one status, and is read if it is honoured."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from fusewright.train.data.formats.registry import READERS
from fusewright.train.recipe.json_schema import json_schema
from fusewright.train.recipe.keys.adapter import PeftKeys
from fusewright.train.recipe.keys.base import (
    Keys,
    UnreadKeys,
    _group,
    _unread_keys,
    aliases,
    extra_of,
    moved,
    nested,
)
from fusewright.train.recipe.keys.dataset import Dataset, PretrainingDataset, PromptFormat
from fusewright.train.recipe.keys.distributed import ContextParallelKeys, FsdpKeys
from fusewright.train.recipe.keys.model import SpecialTokens
from fusewright.train.recipe.keys.optimization import OPTIMIZERS, SCHEDULERS, LrGroupKeys
from fusewright.train.recipe.keys.output import DynamicCheckpointKeys, OutputKeys
from fusewright.train.recipe.keys.preferences import TrlKeys, VllmKeys
from fusewright.train.recipe.keys.row_types import ROW_TYPES
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.recipe import GROUPS, Recipe

from ...tools.reference_docs import page

ROOT = Path(__file__).resolve().parents[3]
MODELS: list[type[Keys]] = [
    Recipe, Dataset, PretrainingDataset, PromptFormat, SpecialTokens, PeftKeys, FsdpKeys,
    LrGroupKeys, DynamicCheckpointKeys, TrlKeys, VllmKeys,
]  # fmt: skip
STATUSES = ("honoured", "subsumed", "not applicable", "not yet available")


@pytest.mark.parametrize("model", MODELS)
def test_every_key_explains_itself(model: type[Keys]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if not field.is_required() and field.get_default(call_default_factory=True) is None:
            assert "nset" in field.description, f"{name}: what does null mean?"
        extra = extra_of(field)
        status = extra.get("status", "honoured")
        assert status in STATUSES, name
        assert bool(extra.get("note")) == (status != "honoured"), f"{name}: why?"
        for special in extra.get("values", ()):
            assert special["status"] in STATUSES, name
            assert special["note"], name


def test_the_vocabulary_is_whole() -> None:
    assert len(Recipe.model_fields) >= 150
    assert sum(len(g.__annotations__) for g in GROUPS) == len(Recipe.model_fields), (
        "a key in two groups"
    )
    taken = set(Recipe.model_fields)
    for old, new in aliases(Recipe).items():
        assert old not in taken
        assert new in taken


def _read_names() -> set[str]:
    """The attributes of recipes and datasets that the engine reads, outside the keys."""
    found: set[str] = set()
    owners = {"recipe", "dataset", "form"}
    for path in (ROOT / "src" / "train").rglob("*.py"):
        if "keys" in path.parts:
            continue
        mine = owners | ({"self"} if path.name == "recipe.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                if name in mine:
                    found.add(node.attr)
    return found


def test_honoured_keys_are_read() -> None:
    read = _read_names()
    for model in (Recipe, Dataset):
        honoured = {
            name
            for name, field in model.model_fields.items()
            if extra_of(field).get("status", "honoured") == "honoured"
        }
        assert honoured - read == set()


def _axolotl_keys() -> list[str]:
    """The dotted names of the keys of Axolotl's newest release."""
    names: list[str] = []
    group = ""
    lines = Path(__file__).with_name("axolotl_keys.txt").read_text(encoding="utf-8").splitlines()
    for line in lines[2:]:
        if line.endswith(":"):
            group = line.removesuffix(":").lstrip(".")
        else:
            names += [f"{group}.{name}".lstrip(".") for name in line.split()]
    return names


def test_each_key_of_axolotl_has_a_status() -> None:
    names = _axolotl_keys()
    assert len(names) > 850
    for dotted in names:
        model: type[Keys] | None = Recipe
        for part in dotted.split("."):
            assert model is not None, f"{dotted}: there is no such group"
            name = aliases(model).get(part, part)
            if name in moved(model):
                continue
            assert name in model.model_fields, f"{dotted} has no status"
            assert extra_of(model.model_fields[name]).get("status", "honoured") in STATUSES
            model = nested(model.model_fields[name].annotation)


def _groups(model: type[Keys]) -> list[tuple[str, type[UnreadKeys]]]:
    inner = {name: nested(field.annotation) for name, field in model.model_fields.items()}
    return [(n, g) for n, g in inner.items() if g is not None and issubclass(g, UnreadKeys)]


def test_a_group_that_nothing_reads_has_the_status_of_its_keys() -> None:
    found = _groups(Recipe)
    assert len(found) >= 15
    for name, group in found:
        extra = extra_of(Recipe.model_fields[name])
        assert extra["status"] != "honoured", name
        for key, field in group.model_fields.items():
            own = extra_of(field)
            assert (own["status"], own["note"]) == (extra["status"], extra["note"]), (name, key)


def test_each_line_of_the_table_is_a_key() -> None:
    rows, groups = _unread_keys()
    models = {model.__name__: model for model in (*GROUPS, *MODELS, ContextParallelKeys)}
    assert sum(map(len, rows.values())) > 480
    for owner, keys in rows.items():
        model = models[owner] if owner in models else _group(owner)
        assert (owner in models) != (owner in groups), owner
        assert {row.name for row in keys} <= set(model.model_fields), owner


def test_names_are_those_of_transformers() -> None:
    assert {o.value for o in OptimizerNames} <= set(get_args(OPTIMIZERS))
    assert {s.value for s in SchedulerType} <= set(get_args(SCHEDULERS))
    strategies = get_args(get_args(OutputKeys.model_fields["hub_strategy"].annotation)[0])
    assert {h.value for h in HubStrategy} <= set(strategies)


def test_types_of_rows_are_those_that_can_be_read() -> None:
    assert {row_type.reader for row_type in ROW_TYPES.values()} == set(READERS)
    for row_type in ROW_TYPES.values():
        assert (row_type.wording is not None) == (row_type.reader == "instruction")


def test_the_schema_says_all_about_each_key() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, key in model["properties"].items():
            assert key.get("deprecated") or (key["description"] and key["status"] in STATUSES), name
    learning_rate = schema["properties"]["learning_rate"]
    number, null = learning_rate["anyOf"]
    assert (number["exclusiveMinimum"], number["type"]) == (0, ["number", "string"])
    assert null == {"type": "null"}
    assert learning_rate["default"] == 2e-4
    assert schema["properties"]["rl"]["status"] == "honoured"
    assert schema["required"] == ["base_model"]
    assert schema["properties"]["model_config"]["deprecated"]
    assert schema["additionalProperties"] is False


def test_validators_enforce_the_schema() -> None:
    schema = json_schema()
    limits = re.findall(r'"(ge|gt|le|lt)":', json.dumps(schema))
    assert not limits  # pydantic's names, which no validator knows
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    validator.check_schema(schema)
    files = [*(ROOT / "examples").rglob("*.yaml")]
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert [e.message for e in validator.iter_errors(values)] == [], file
    assert len(files) >= 18
    least = {"base_model": "a", "datasets": [{"path": "b"}]}
    right = {"learning_rate": "1e-3", "logging_steps": 0.1, "warmup_ratio": 0, "lora_r": None}
    assert validator.is_valid({**least, **right})
    for key, value in (
        ("logging_steps", 0), ("learning_rate", 0), ("learning_rate", "fast"), ("lora_r", "a"),
        ("micro_batch_size", 0), ("warmup_ratio", 1), ("val_set_size", -1), ("dpo_beta", "1e"),
    ):  # fmt: skip
        assert not validator.is_valid({**least, key: value}), key


def test_the_page_of_keys_is_up_to_date() -> None:
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.tools.reference_docs docs/recipes.md"


def test_long_lists_of_values_stand_once_on_the_page() -> None:
    below = [line for line in page().splitlines() if line.startswith("`dpo_loss_type`: ")]
    assert len(below) == 1
    assert "| `dpo_loss_type` | a name or a list of names, see below |" in page()


@pytest.mark.parametrize(("old", "new"), aliases(Recipe).items())
def test_older_names(old: str, new: str) -> None:
    value: Any = {"a": 1} if "model_" in new else 0.5
    value = 1 if new == "context_parallel_size" else value
    value = "main" if "revision" in new or new == "model_type" else value
    value = {"eval_strategy": "no"}.get(new, value)
    whole = ("dataset_processes", "eval_max_new_tokens", "gc_collect_steps")
    value = True if new == "use_dft" else value
    value = 3 if new in whole or "buffer" in new or "jagged" in new else value
    recipe = load_recipe({"base_model": "a/b", "datasets": [{"path": "a/b"}], old: value})
    assert getattr(recipe, new) == value
