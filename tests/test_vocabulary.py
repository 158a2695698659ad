"""Names and phrases that the field's own words have replaced, and that must not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TEXTS = [*SOURCES, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]

IDENTIFIERS = {
    "as_asked": "apply_limits",
    "beat": "on_batch",
    "began": "start",
    "calm": "a word for what it holds",
    "diary": "run_log",
    "forget_gguf": "clear_gguf_marks",
    "give_up": "abandon",
    "patiently": "deferring_signals",
    "rows_told": "rows_message",
    "sketch": "meta_model",
    "spared": "guarded",
    "stepped": "on_step_end, has_stepped, updated",
    "stepping": "on_step_begin",
    "strangers": "external_users, foreign_files",
    "take_up": "load_checkpoint",
    "told": "messages",
    "why_unwritable": "write_error_reason",
    "_in_company": "_with_second_row",
}
"""Names of functions, variables, attributes and arguments, each with what is said instead."""

WORDS = {
    "BadStep": "NonFiniteStepError",
    "Diary": "RunLog",
    "OurKeys": "FusewrightKeys",
    "PeerKeys": "SubsumedKeys",
    "Randomness": "RngState",
    "ScaleKeys": "DistributedKeys",
    "Steered": "TrainerHooks",
    "StepKeys": "OptimizationKeys",
    "Unwritable": "CheckpointWriteError",
    "patiently": "deferring_signals",
    "strangers": "others, external users",
}
"""Words that no text and no code may have."""

PHRASES = {
    "costs the run nothing": "does not end the run",
    "failed, and the run goes on": "failed; the run continues",
    "go on from": "resume from",
    "going on from a checkpoint": "resuming from a checkpoint",
    "numbers that are none": "NaN or infinite",
    "must be a share": "must be a fraction",
    "not copied as whole": "not copied completely",
    "positions that it has not learnt": "positions that it was not trained on",
    "stepped as one": "updated as one",
    "the device that trains": "the training device",
    "the token that stands": "the token that follows",
    "Unset: no wish": "Unset: not requested",
    "what becomes of each key": "what each key does",
    "the run goes on": "the run resumes",
    "while training goes on": "during training",
}
"""In any case, and across line breaks."""


def _names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a module calls things, with the line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.Name():
                yield node.id, node.lineno
            case ast.Attribute():
                yield node.attr, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.keyword() if node.arg:
                yield node.arg, node.value.lineno
            case ast.alias():
                yield node.asname or node.name, node.lineno


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_no_private_vocabulary_in_names(trees: dict[Path, ast.Module]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}; say {IDENTIFIERS[name]}"
        for path, tree in trees.items()
        for name, line in _names(tree)
        if name in IDENTIFIERS
    ]
    assert found == []


@pytest.mark.parametrize("banned", [WORDS, PHRASES], ids=["words", "phrases"])
def test_no_private_vocabulary_in_texts(banned: dict[str, str]) -> None:
    flags = re.IGNORECASE if banned is PHRASES else 0
    any_of = "|".join(re.escape(text).replace(r"\ ", r"\s+(?:#\s+)?") for text in banned)
    pattern = re.compile(rf"\b(?:{any_of})\b", flags)
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]}")
    assert found == [], f"say {banned}"


def test_a_public_class_name_is_used_once(trees: dict[Path, ast.Module]) -> None:
    places: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("def began(): ...", "began"), ("x.told", "told"), ("f(calm=1)", "calm")],
)
def test_the_scan_finds_names(text: str, pattern: str) -> None:
    assert pattern in {name for name, _ in _names(ast.parse(text))}
