"""Rows that a Python function of the recipe changes before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....errors import DataError, RecipeError
from ...own_functions import load_function, what_failed
from ...recipe.recipe import Recipe
from ..formats.fields import fields_of, kind
from .rows import JudgedSteps, Preference, PreferenceReader


class OwnTypeReader:
    """Reads rows of a type that is a function, in the form that Axolotl calls it.

    ``function(recipe)`` returns what changes a row, ``change(row, tokenizer=None) -> row``, alone
    or in a pair with ``{"remove_columns": [names]}`` (or ``"__all__"``): the fields that the row
    loses besides.

    Args:
        name: of the function.
        inner: reads the changed rows.
        recipe: what the function gets, as a mapping; and the caller's permission.

    Raises:
        RecipeError: the function cannot be loaded, or is not allowed.
    """

    def __init__(self, name: str, inner: PreferenceReader, recipe: Recipe) -> None:
        self.name, self.inner, self.recipe = name, inner, recipe
        self._load()

    def _load(self) -> None:
        function = load_function(self.name, "datasets: type", self.recipe.consent)
        try:
            made = function(self.recipe.model_dump(mode="json"))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the code raises, SystemExit among it
            said = what_failed(error, function)
            raise RecipeError(f"datasets: type: {self.name} {said}") from error
        options: Any = {}
        if isinstance(made, tuple) and len(made) == 2:
            made, options = made
        if not callable(made) or not isinstance(options, Mapping):
            raise RecipeError(
                f"datasets: type: {self.name} must return a function that changes a row, not "
                f"{kind(made)}"
            )
        self.change: Callable[..., Any] = made
        self.removed = options.get("remove_columns") or ()

    def read(self, row: Any, where: str) -> Preference | JudgedSteps:
        """The content of a row, after the function has changed it."""
        row = fields_of(row, where, "prompt")
        try:
            made = self.change(dict(row), tokenizer=None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # likewise
            raise DataError(f"{where}: {self.name} {what_failed(error, self.change)}") from error
        if not isinstance(made, Mapping):
            raise DataError(f"{where}: {self.name} must return an object, not {kind(made)}")
        kept = {} if self.removed == "__all__" else row
        kept = {name: value for name, value in kept.items() if name not in self.removed}
        return self.inner.read({**kept, **made}, where)

    def __getstate__(self) -> dict[str, Any]:
        """Other processes load the function again: what it returns cannot be pickled."""
        return {k: v for k, v in vars(self).items() if k not in ("change", "removed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the function."""
        vars(self).update(state)
        self._load()
