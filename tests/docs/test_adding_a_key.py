"""docs/adding-a-key.md: the records on the page do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.train.data.formats.registry import Encoder
from fusewright.train.data.preferences.encoder import PreferenceEncoder
from fusewright.train.recipe import conflicts, load, problems, status
from fusewright.train.recipe.keys import base, row_types
from fusewright.train.recipe.load import check
from fusewright.train.recipe.recipe import Dataset, Recipe
from fusewright.train.recipe.status import entries

from ..train.conftest import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-key.md"
BLOCKS = dict(
    re.findall(
        r"^<!-- (\w+) -->\n```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
)
BASE = "base_model: a/b\ndatasets: [{path: a/b}]\n"


@pytest.fixture
def bigger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Recipe]:
    """A recipe that also has the keys of the page."""
    table = tmp_path / "base.py"
    table.with_name("unread_keys.txt").write_text(BLOCKS["unread"])
    monkeypatch.setattr(base, "__file__", str(table))
    base._unread_keys.cache_clear()
    names: dict[str, Any] = {**vars(base), "__name__": __name__}
    exec(compile(BLOCKS["key"], str(PAGE), "exec", dont_inherit=True), names)
    model = type("Bigger", (Recipe, names["NormKeys"]), {"__module__": __name__})
    monkeypatch.undo()
    base._unread_keys.cache_clear()
    for module in (conflicts, load, problems, status):
        monkeypatch.setattr(module, "Recipe", model)
    assert issubclass(model, Recipe)
    return model


def test_a_key_with_its_conflicts(bigger: type[Recipe], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for mistake in yaml.safe_load(BLOCKS["mistakes"]):
        keys = (f"{name}: {str(value).lower()}\n" for name, value in mistake["recipe"].items())
        path.write_text(BASE + "".join(keys))
        with pytest.raises(load.RecipeError) as refused:
            check(path)
        assert str(refused.value) == f"{path}, {mistake['said']}"
    path.write_text(BASE + "norm_block: 4\ntheir_norms: true\n")
    found = {entry.key: (entry.status, entry.note) for entry in entries(check(path).values)}
    assert found["norm_block"] == ("not applicable", "only fast_norms reads it")
    assert found["their_norms"] == ("subsumed", "fusewright's rewrite rms_norm (key optimize)")
    path.write_text(BASE + "fast_norms: true\nnorm_block: 4\n")
    assert check(path).recipe.model_dump()["norm_block"] == 4
    own = [name for name in bigger.model_fields if name not in Recipe.model_fields]
    assert own == ["fast_norms", "their_norms", "norm_block"]


def test_a_type_of_supervised_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = eval(BLOCKS["row_type"], vars(row_types))
    monkeypatch.setitem(row_types.ROW_TYPES, record.name, record)
    dataset = Dataset(path="x", type="dolly")
    tokenizer = make_tokenizer()
    encoder = Encoder(dataset, Recipe(base_model="x", datasets=[dataset]), tokenizer)
    row = {"instruction": "Why?", "context": "This.", "response": "So."}
    (tokens,) = encoder.encode([("x, line 1", row)])
    text = tokenizer.decode(tokens.ids)
    assert "### Instruction:\nWhy?\n\n### Input:\nThis.\n\n### Response:\nSo." in text


def test_a_type_of_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    record = eval(BLOCKS["preference_type"], vars(row_types))
    monkeypatch.setitem(row_types.PREFERENCE_TYPES, record.name, record)
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b", "type": record.name}]}
    tokenizer = make_tokenizer()
    for rl, answers in (("dpo", {"chosen": "So.", "rejected": "No."}),
                        ("kto", {"completion": "So.", "label": True})):  # fmt: skip
        recipe = check({**keys, "rl": rl, "micro_batch_size": 2}).recipe
        encoder = PreferenceEncoder(recipe.datasets[0], recipe, tokenizer)
        (row,) = encoder.encode([("x, line 1", {"query": "Why?", **answers})])
        assert "user\nWhy?<|im_end|>" in tokenizer.decode(row.prompt)
        assert "So." in tokenizer.decode(row.answers[0].ids)
