"""The two tables of methods, and what every trainer of ours must be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import Trainer

from fusewright.train.recipe.keys.preferences import WITH_BETA, TrlKeys
from fusewright.train.recipe.methods_table import METHODS as OF_RECIPES
from fusewright.train.recipe.methods_table import Method
from fusewright.train.recipe.recipe import Recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

from fusewright.train.methods.distillation import DistillationObjective
from fusewright.train.methods.table import METHODS
from fusewright.train.proof.compare import ProofTrainer
from fusewright.train.trainer.engine import EngineMixin, FineTuner
from fusewright.train.trainer.objective import Objective

TRAINERS = {FineTuner, ProofTrainer, *(method.trainer for method in METHODS.values())}
OBJECTIVES = {Objective, DistillationObjective, *(type(m.objective()) for m in METHODS.values())}


def test_both_have_the_methods_that_recipes_name() -> None:
    assert set(METHODS) == set(OF_RECIPES) == set(get_args(Method))


def _texts(kind: Any) -> set[str]:
    """The literals in a type."""
    return {
        t for part in get_args(kind) for t in ([part] if isinstance(part, str) else _texts(part))
    }


def test_every_list_of_methods_has_them_all() -> None:
    named = {name for name, method in OF_RECIPES.items() if method.head.key is None}
    assert _texts(Recipe.model_fields["rl"].annotation) == {*named, "ebft"}  # refused with a reason
    recipe = Recipe(base_model="x")
    with_beta = {n for n in named if "beta" in OF_RECIPES[n].arguments(recipe, TrlKeys())}
    assert set(WITH_BETA) == with_beta


@pytest.mark.parametrize("kind", sorted(TRAINERS, key=str), ids=lambda kind: kind.__name__)
def test_a_trainer_is_the_engine_before_somebody_elses(kind: Any) -> None:
    ours = [c for c in kind.__mro__ if c.__module__.startswith("fusewright.")]
    assert ours == [kind, EngineMixin]
    assert issubclass(kind, Trainer)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES, key=str), ids=lambda kind: kind.__name__)
def test_an_objective_only_has_what_the_engine_asks_for(kind: type[Objective]) -> None:
    """A hook that is misspelt would never be called."""
    helpers = {"counts", "weighed", "pending", "evaluated_loss"}  # of those of preferences
    public = {name for name in vars(kind) if not name.startswith("_")}
    assert public <= {*vars(Objective), *helpers}


@pytest.mark.parametrize("name", OF_RECIPES)
def test_the_documentation_says_what_the_table_says(name: Method) -> None:
    method = OF_RECIPES[name]
    text = Path(__file__).parents[3].joinpath("docs/preferences.md").read_text(encoding="utf-8")
    key = f"{method.head.key}: true" if method.head.key else f"rl: {name}"
    row = next(r for r in text.splitlines() if r.startswith("|") and f"`{key}`" in r)
    rows = {"labelled": "labelled answers", "steps": "steps"}.get(method.rows, method.rows)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert rows in cells[1], row
    answer = {"always": "yes", "never": "no", "with beta": "only with a `beta` above 0"}
    assert re.match(answer[method.reference], cells[3]), row
