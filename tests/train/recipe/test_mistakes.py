"""Keys that do not go together, are not there, or cannot have a value: what is said about each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.errors import RecipeError
from fusewright.train.recipe.keys.base import aliases, moved
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.problems import OTHER_NAMES
from fusewright.train.recipe.recipe import Recipe

MISTAKES: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("mistakes.yaml").read_text(encoding="utf-8")
)
CASES = [
    pytest.param(mistake, id=f"{subject}: {mistake['said']}")
    for subject, mistakes in MISTAKES.items()
    for mistake in mistakes
]


@pytest.mark.parametrize("mistake", CASES)
def test_a_mistake_is_told(mistake: dict[str, Any], tmp_path: Path) -> None:
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}], **mistake["recipe"]}
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name}: {_flow(value)}\n" for name, value in keys.items()))
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    message = str(refused.value)
    assert mistake["said"] in message
    assert (len(message.splitlines()) == 1) == mistake.get("alone", True)


def test_names_of_other_libraries_lead_to_keys() -> None:
    read = {*Recipe.model_fields, *aliases(Recipe), *moved(Recipe)}
    assert not read & set(OTHER_NAMES)  # else nobody would be told
    assert {key.partition(":")[0] for key in OTHER_NAMES.values()} <= set(Recipe.model_fields)
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}], **dict.fromkeys(OTHER_NAMES, 1)}
    with pytest.raises(RecipeError) as refused:
        check(keys)
    told = dict(
        re.findall(r"(\w+): is not a key of a recipe; did you mean (.+)\?", str(refused.value))
    )
    assert told == OTHER_NAMES


@pytest.mark.parametrize("name", ["image_column", "field_images", "image_field"])
def test_the_field_of_images_has_one_name(name: str) -> None:
    for inside in (False, True):
        dataset = {"path": "a/b", **({name: "photo"} if inside else {})}
        keys = {"base_model": "a/b", "datasets": [dataset], **({} if inside else {name: "photo"})}
        said = f"{name}: is not a key of a recipe: a row's field of images is 'images' or 'image'"
        with pytest.raises(RecipeError, match=said):
            check(keys)


def _flow(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9)
    return text.removesuffix("...\n").strip()
