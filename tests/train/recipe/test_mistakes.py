"""Keys that do not go together, are not there, or cannot have a value: what is said about each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.errors import RecipeError
from fusewright.train.recipe.keys.base import aliases, moved
from fusewright.train.recipe.keys.row_types import OTHER_TYPES, PREFERENCE_TYPES, TYPES
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


def test_other_names_of_types_lead_to_types() -> None:
    assert set(OTHER_TYPES.values()) <= set(TYPES)
    assert not set(OTHER_TYPES) & {*TYPES, *PREFERENCE_TYPES} - {"chatml"}  # of preferences alone


# --- paths ----------------------------------------------------------------------------------------


def told(tmp_path: Path, text: str) -> list[str]:
    """The problems of a recipe, a line each."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_paths_are_checked_with_the_keys(tmp_path: Path) -> None:
    lines = told(
        tmp_path,
        "base_mdel: ./model\n"
        "lora_r: many\n"
        "datasets:\n"
        "  - {path: ./none.jsonl, type: alpaca, fild: x}\n"
        "  - {type: [3]}\n"
        "test_datasets: [{path: ./no.jsonl, images_dir: ./no}]\n"
        "sample_image: ./no.png\n"
        "eot_tokens: [{}]\n",
    )
    assert len(lines) == 11, lines
    for expected in (
        "base_model: is missing",
        "line 1: base_mdel: is not a key of a recipe; did you mean base_model?",
        "line 2: lora_r: must be a whole number",
        f"line 4: datasets.0.path: there is no ./none.jsonl in {tmp_path}",
        "line 4: datasets.0.fild: is not a key",
        "line 5: datasets.1.path: is missing",
        "line 5: datasets.1.type",
        "line 6: test_datasets.0.path: there is no ./no.jsonl",
        "line 6: test_datasets.0.images_dir: there is no ./no in",
        "line 7: sample_image: there is no ./no.png",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("data/row.jsonl", "data/rows.jsonl"),
        ("data/rows.json", "data/rows.jsonl"),
        ("dta/Rows.jsonl", "data/rows.jsonl"),
        ("./datas/rows.jsonl", "data/rows.jsonl"),
        ("data/other.jsonl", None),
        ("x/y/z.jsonl", None),
    ],
)
def test_a_path_that_is_not_there_leads_to_one_that_is(
    tmp_path: Path, path: str, meant: str | None
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(f"base_model: a/b\ndatasets: [{{path: {path}}}]\n")
    with pytest.raises(RecipeError, match=f"there is no {re.escape(path)} in") as refused:
        load_recipe(tmp_path / "recipe.yaml")
    hint = str(refused.value).partition("; ")[2]
    assert hint == (f"did you mean {meant}?" if meant else "")


def test_the_name_of_a_package_leads_to_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file in (("my_model", "config.json"), ("my_code", "code.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    datasets = [{"path": "a/b"}]
    for name in ("my-model", "my_model"):
        said = f"base_model: {name} is the name of an installed package; did you mean package:my_m"
        with pytest.raises(RecipeError, match=said):
            load_recipe({"base_model": name, "datasets": datasets})
    for other in ("my-code", "a/my-model", "gpt2", "json"):  # an id on the hub
        load_recipe({"base_model": other, "datasets": datasets})


def test_what_stands_in_for_a_wrong_key_is_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {
        "output_dir": ".",  # base_model, which is missing, has the current folder as a stand-in
        "micro_batch_size": "four",
        "deepspeed": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}},
        "datasets": [{"path": "rows.jsonl"}],
    }
    with pytest.raises(RecipeError) as refused:
        load_recipe(wrong)
    text = str(refused.value)
    for said in ("base_model", "micro_batch_size", "there is no rows.jsonl"):
        assert said in text
    assert "is the folder of" not in text
    assert "train_micro_batch_size_per_gpu" not in text
    right = {**wrong, "micro_batch_size": 2, "base_model": "."}
    with pytest.raises(RecipeError) as refused:
        load_recipe(right)
    assert "is the folder of base_model" in str(refused.value)
    assert "train_micro_batch_size_per_gpu" in str(refused.value)
