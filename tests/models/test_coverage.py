"""The zoo: every causal LM that transformers registers trains as in eager, and loses no rewrite.

By default every twentieth architecture is tried, without adapters; all of them, with LoRA too, by
``pytest -m zoo``.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
import torch
import transformers

from fusewright.rewrite.tolerance import FACTOR, unit

from . import architectures
from .coverage import TOLERANCE, Row, measure
from .support import SUPPORT, TITLES, read

SAMPLE, FIRST = 20, 6
NAMES = architectures.names()
PAGE = SUPPORT.read_text()


def _cases() -> list[object]:
    """All, in two halves: every architecture is in both, with adapters in one of them."""
    return [
        pytest.param(
            name, lora,
            marks=() if i % SAMPLE == FIRST and not lora else pytest.mark.zoo(half=(i + lora) % 2),
        )
        for i, name in enumerate(NAMES)
        for lora in (False, True)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only lose time to threads that wait
    yield
    torch.set_num_threads(threads)


@pytest.mark.long("axk2-False", "qwen4_exp_text-False")
@pytest.mark.parametrize(("name", "lora"), _cases())
def test_an_architecture_trains_as_in_eager(name: str, lora: bool) -> None:
    row = measure(name, lora)
    if row.not_built:
        known = name in architectures.IMPOSSIBLE or transformers.__version__ not in PAGE
        assert known, f"it could be built once: {row.not_built}"
        pytest.skip(reason=row.not_built)  # why there is no such model
    assert not row.problem
    assert row.loss_error is not None
    assert row.loss_error <= TOLERANCE
    assert row.grad_error is not None
    if row.grad_error > TOLERANCE:  # far from eager only where eager itself is far from the truth
        assert row.exact_errors is not None
        ours, eagers = row.exact_errors
        assert ours <= FACTOR * eagers + unit(torch.float32)
    _assert_nothing_fell(row)


def _assert_nothing_fell(row: Row) -> None:
    before = read(PAGE).get((row.name, row.lora))
    if before is None:  # a name that only another version of transformers has
        assert transformers.__version__ not in PAGE, "it is not in docs/support.md: write it anew"
        return
    now = {TITLES[kind]: counts for kind, counts in row.candidates.items() if counts[1]}
    now |= {rule: (count, count) for rule, count in row.rewritten.items()}
    fallen = {
        name: f"{now.get(name, (0, 0))} instead of {then}"
        for name, then in before.items()
        if now.get(name, (0, 0))[0] < then[0] or (name in TITLES.values() and now[name] != then)
    }
    # other versions write some models otherwise: what is there may differ, what is left may not
    if transformers.__version__ not in PAGE:
        fallen = {n: f for n, f in fallen.items() if n in TITLES.values() and _more_left(row, n)}
    assert not fallen, f"docs/support.md says otherwise: {fallen}"


def _more_left(row: Row, title: str) -> bool:
    before = read(PAGE)[row.name, row.lora].get(title, (0, 0))
    kind = next(k for k, t in TITLES.items() if t == title)
    done, there = row.candidates.get(kind, (0, 0))
    return there - done > before[1] - before[0]


def test_nearly_all_names_can_be_built() -> None:
    """185 of the 196 that transformers 5.24 has, and as many of a version with fewer names."""
    assert (len(NAMES) - len(architectures.IMPOSSIBLE)) / len(NAMES) >= 185 / 196


def test_no_source_names_an_architecture() -> None:
    source = pathlib.Path(__file__).parents[2] / "src"
    types = set(NAMES) - {"codegen", "git", "ctrl"}  # words of ours
    # what users write: keys, templates and prompts have names, and the page of keys and a new
    # recipe have examples; and what another engine patches model by model
    words_of_recipes = {
        source / "train" / name
        for name in ("recipe/keys", "chat_templates.py",
                     "data/formats/instruction.py", "starter/init.py", "plan/engines.py")
    }  # fmt: skip
    found = []
    for path in source.rglob("*.py"):
        if words_of_recipes & {path, *path.parents}:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # docstrings may name the model that a formula is known from
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        # a package, and the part of transformers that reads its files
        text = re.sub(r"mistral-common|integrations\.mistral", "", ast.unparse(tree).lower())
        words = set(re.findall(r"[a-z0-9_]+", text))
        found += [f"{path.name}: {w}" for w in sorted(words & types)]
    assert not found
