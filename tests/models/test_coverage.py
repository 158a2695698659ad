"""The zoo: every model for language that transformers registers trains as in eager, and loses no
rewrite.

By default every twentieth causal language model is tried, without adapters, and CI tries a few of
the other kinds; all of them, with LoRA too, by ``pytest -m zoo``, one kind by
``pytest -m "zoo(kind='multimodal')"``.
"""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import re
from dataclasses import asdict

import pytest
import torch
import transformers

from fusewright.kernels.tolerance import FACTOR, unit

from . import architectures
from .coverage import TOLERANCE, Case, Row, cases, measure, towers_of
from .support import COLUMNS, PAGES, SUPPORT, TITLES, page_by_name, read, read_by_name

SAMPLE, FIRST = 20, 6
NAMES = architectures.names()
PAGE = SUPPORT.read_text()
OTHER_KINDS = sorted(COLUMNS)
IN_CI = {
    Case(name, kind, call)
    for kind, some in {
        "multimodal": {
            "default": ("llava", "mllama", "qwen3_vl", "voxtral"),
            "Trainer": ("internvl", "mistral3"),
            "LoRA": ("gemma3", "qwen2_5_vl"),
        },
        "classification": {"default": ("gpt2", "roberta"), "LoRA": ("gemma2",)},
        "embedding": {"default": ("modernbert",), "LoRA": ("qwen3",)},
        "encoder-decoder": {"default": ("bart", "t5gemma"), "LoRA": ("t5",)},
    }.items()
    for call, names in some.items()
    for name in names
}


def _cases() -> list[object]:
    """All, in four parts: an architecture is in two, with adapters in one of them."""
    return [
        pytest.param(
            name, lora,
            marks=() if i % SAMPLE == FIRST and not lora else pytest.mark.zoo(part=(i + lora) % 4),
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


@pytest.mark.long("axk2-False", "laguna-False", "qwen4_exp_text-False")
@pytest.mark.parametrize(("name", "lora"), _cases())
def test_an_architecture_trains_as_in_eager(name: str, lora: bool) -> None:
    row = measure(Case(name, call="Trainer and LoRA" if lora else "Trainer"))
    if row.not_built:
        known = ("causal", name) in architectures.IMPOSSIBLE or transformers.__version__ not in PAGE
        assert known, f"it could be built once: {row.not_built}"
        pytest.skip(reason=row.not_built)  # why there is no such model
    _assert_near_eager(row)
    _assert_nothing_fell(row)


def _others() -> list[object]:
    """All cases of the other kinds: CI has a few of them."""
    return [
        pytest.param(
            case, id="-".join(case),
            marks=pytest.mark.long if case in IN_CI else pytest.mark.zoo(kind=case.kind),
        )
        for kind in OTHER_KINDS for case in cases(kind)
    ]  # fmt: skip


@functools.cache
def _page(kind: str) -> str:
    return PAGES[kind].read_text()


@pytest.mark.parametrize("case", _others())
def test_a_model_of_another_kind_trains_as_in_eager(case: Case) -> None:
    row, page = measure(case), _page(case.kind)
    could_not = f"- `{case.name}`: " in page
    another = transformers.__version__ not in page  # what is there, it may write otherwise
    if row.not_built:
        assert could_not or another, f"it could be built once: {row.not_built}"
        pytest.skip(reason=row.not_built)  # why there is no such model
    _assert_near_eager(row)
    before = read_by_name(page).get(case.name)
    if another or (could_not and before is None):  # a package may be here that was not there
        return
    assert before is not None, f"it is not in {PAGES[case.kind].name}: write it anew"
    for title, column in COLUMNS[case.kind].items():
        if column.call == case.call:
            assert title in before, f"it was not measured for {PAGES[case.kind].name}"
            (done, there), then = column.count(row), before[title]
            assert there == then[1], title
            assert done >= then[0], f"{title}: {done} instead of {then[0]}: {row.left}"


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_the_page_of_another_kind_has_every_name(kind: str) -> None:
    page = _page(kind)
    if transformers.__version__ not in page:
        pytest.skip(reason="another version of transformers has other names")
    built = set(read_by_name(page))
    listed = page.partition("\n## Not built\n")[2].partition("\n## ")[0]
    not_built = set(re.findall("^- `([^`]+)`: ", listed, re.MULTILINE))
    assert built | not_built == set(architectures.names(kind))
    assert len(not_built) / len(built) < 0.08


def _assert_near_eager(row: Row) -> None:
    assert not row.problem
    assert row.loss_error is not None
    assert row.loss_error <= TOLERANCE
    assert row.grad_error is not None
    if row.grad_error > TOLERANCE:  # far from eager only where eager itself is far from the truth
        assert row.exact_errors is not None
        ours, eagers = row.exact_errors
        assert ours <= FACTOR * eagers + unit(torch.float32)


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
    impossible = sum(kind == "causal" for kind, _ in architectures.IMPOSSIBLE)
    assert (len(NAMES) - impossible) / len(NAMES) >= 185 / 196


def test_no_source_names_an_architecture() -> None:
    source = pathlib.Path(__file__).parents[2] / "src"
    every = {name for kind in architectures.KINDS for name in architectures.names(kind)}
    types = every - {"codegen", "git", "ctrl"}  # words of ours
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
        # a package, the part of transformers that reads its files, and llama.cpp with its programs
        tools = (
            r"mistral-common|integrations\.mistral"
            r"|llama[._-]cpp(\.llama\b)?|llama-(server|quantize)"
        )
        text = re.sub(tools, "", ast.unparse(tree).lower())
        words = set(re.findall(r"[a-z0-9_]+", text))
        found += [f"{path.name}: {w}" for w in sorted(words & types)]
    assert not found


@pytest.mark.parametrize("name", ["idefics3", "mllama", "qwen3_vl", "voxtral"])
def test_pictures_and_sounds_reach_the_loss(name: str) -> None:
    model = architectures.build(name, "multimodal")
    architectures.loss_of(model, architectures.step_inputs(model, "multimodal")).backward()
    towers = {path: model.get_submodule(path) for path in towers_of(model)}
    assert towers
    for path, tower in towers.items():
        assert any(p.grad is not None and p.grad.any() for p in tower.parameters()), path


def test_a_page_by_name_holds_what_was_counted() -> None:
    rows = [
        Row(
            Case("llava", "multimodal", call), grad_error=1e-7, loss_error=0.0,
            candidates={"norm": (7, 9), "loss": (1, 1)}, towers={"norm": (2, 4)},
            left=[("norm", "model.vision_tower.layers.0.norm", 2)],
        )
        for call in ("default", "Trainer")
    ]  # fmt: skip
    rows.append(Row(Case("llama4", "multimodal", "default"), not_built="why|not"))
    text = page_by_name("multimodal", rows)
    assert read_by_name(text) == {
        "llava": {
            "language": (6, 6), "under Trainer": (6, 6), "language with LoRA": (0, 0),
            "towers": (2, 4), "towers with LoRA": (0, 0), "losses": (1, 1),
        }
    }  # fmt: skip
    assert "norms in `model.vision_tower.layers.*` (2x)" in text
    assert "- `llama4`: why/not" in text
    assert "| towers | 2 | 4 | 50.0% |" in text
    assert [Row.read(json.dumps(asdict(row))) for row in rows] == rows
