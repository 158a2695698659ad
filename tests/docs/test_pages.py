"""What the pages say can be done: their links, commands, recipes and Python are real.

The site itself is built, and searched, in ``test_site.py``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import fusewright.train
from fusewright import errors
from fusewright.cli.main import app
from fusewright.train.recipe.load import check
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.starter.look import TOKENIZED, shape_of

from . import notebooks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


@functools.cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[str]:
    """The code of one language; what a page tests by itself is marked with a comment before it."""
    for match in FENCE.finditer(text(page)):
        marked = text(page)[: match.start()].endswith("-->\n")
        if match[2] == language and not marked:
            yield "".join(line[len(match[1]) :] for line in match[3].splitlines(keepends=True))


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of headings, and those that are written out."""
    prose = FENCE.sub("", text(page))
    found: set[str] = set(re.findall(r'<a id="([^"]+)">', prose))
    for heading in re.findall(r"^#{1,6} (.+)$", prose, re.M):
        plain = unicodedata.normalize("NFC", re.sub(r"[`*]|\]\([^)]*\)", "", heading)).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain.strip()).replace(" ", "-"))
    return found


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(page)))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert wrong == []


@by_name
def test_python_compiles_and_its_imports_are_there(page: Path) -> None:
    for code in blocks(page, "python"):
        _imports_are_there(code)


def _imports_are_there(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusewright"):
            module = importlib.import_module(str(node.module))
            assert [n.name for n in node.names if not hasattr(module, n.name)] == []


@by_name
def test_recipes_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}
    (tmp_path / "of_mine.py").write_text("\n".join(blocks(page, "python")))  # recipes may name it
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "yaml"):
        check({**base, **yaml.safe_load(code)}, with_data=False)


def test_each_row_of_a_common_type_is_of_that_type() -> None:
    table = re.findall(r"^\| `(\{.*?\})`[^|]*\| (.*?) \|", text(DOCS / "training.md"), re.M)
    assert len(table) == 8
    for row, entry in table:
        named = re.search(r"`type: ([\w.]+)`", entry)
        shape = shape_of(json.loads(row), row)
        assert shape.trained().get("type") == (named and named[1]), row
        assert ("rl: dpo" in entry) == (shape.pair is not None)
        assert ("skip_prepare_dataset" in entry) == (shape.kind == TOKENIZED)


def test_the_reference_has_all_that_is_public() -> None:
    named = set(re.findall(r"^::: (\S+)$", text(DOCS / "api.md"), re.M))
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    raised = {k.__name__ for k in kinds if issubclass(k, errors.FusewrightError)}
    here = {f"fusewright.{name}" for name in fusewright.__all__}
    assert here | {f"fusewright.train.{name}" for name in fusewright.train.__all__} <= named
    assert raised <= {name.rpartition(".")[2] for name in named}


def test_every_command_and_option_exists() -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for name, command in commands.items()
    }
    wrong, seen = [], 0
    for page in PAGES:
        shell = [line for code in blocks(page, "bash") for line in code.splitlines()]
        written = re.findall(r"(?:^ {4}|`|&& )(fusewright [a-z][^`\n]*)", text(page), re.M)
        for line in [*written, *(line for line in shell if line.startswith("fusewright "))]:
            words = _words(line)
            if len(words) < 2 or not re.fullmatch(r"[a-z-]+", words[1]):
                continue
            seen += 1
            known = options.get(words[1])
            if known is None:
                wrong.append((page.name, line))
                continue
            for word in words[2:]:
                name = word.partition("=")[0]
                key = name.lstrip("-").replace("-", "_").partition(".")[0].removeprefix("no_")
                takes_keys = commands[words[1]].context_settings.get("ignore_unknown_options")
                is_key = takes_keys and key in Recipe.model_fields
                if name.startswith("-") and name not in known and not is_key:
                    wrong.append((page.name, line))
    assert wrong == []
    assert seen > 100


def _words(line: str) -> list[str]:
    line = re.split(r" -- | \| | && |  #| > ", line)[0]
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # the quotation goes on in the next line
        return line.replace('"', "").split()


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_starts_anywhere_and_shows_what_its_code_printed(path: Path) -> None:
    notebook = yaml.safe_load(path.read_text(encoding="utf-8"))
    first, *others = notebooks.code(notebook)
    settings = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    repository = re.search(r"^repo_url: (.+)$", settings, re.M)
    assert repository is not None
    assert f"@ git+{repository[1]}" in first
    assert "torch.cuda.is_available()" in first
    for code in others:
        _imports_are_there(re.sub(r"^[!%].*$", "", code, flags=re.M))
    assert notebook["metadata"]["fusewright"]["code"] == notebooks.digest(notebook), (
        "run python -m tests.docs.notebooks --write"
    )
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
            assert (path.parent / target).exists(), target
