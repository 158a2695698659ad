"""The site is built without warnings, its search finds the right page, and its notebooks run.

Needs ``pip install -e ".[docs]"``, and Node.js for the search.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import notebooks

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("material", "mkdocstrings", "nbclient"))),
        reason='needs pip install -e ".[docs]"',
    ),
]
FOUND = {
    "resume": "troubleshooting/#resume-a-run-that-was-stopped",
    "OOM": "troubleshooting/#out-of-memory-oom",
    "out of memory": "troubleshooting/#out-of-memory-oom",
    "why is my rewrite refused": "troubleshooting/#why-is-a-rewrite-refused-refused-",
    "nan": "troubleshooting/#the-loss-is-nan-or-the-gradient-norm-is-inf",
    "optimize": "optimize/",
    "restore": "optimize/",
    "dpo": "preferences/",
    "lora": "adapters/",
    "multi gpu": "scale/",
    "gguf": "export/",
    "unsloth": "from-unsloth/",
    "axolotl": "from-axolotl/",
    "liger": "from-liger-kernel/",
    "write a rule": "adding-a-rewrite/",
    "train on my own data": "training/",
    "packing": "training/#data-dataset-formats-label-masks-packing",
}
"""What a reader types, and where the best answer is."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = ROOT / "docs" / "site" / "mkdocs.yml"
    done = subprocess.run([*command, "-f", str(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_and_every_export_is_there(site: Path) -> None:
    import fusewright

    pages = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert {p for p in pages if not (site / p / "index.html").exists()} == set()
    assert "An optimizing compiler" in (site / "index.html").read_text(encoding="utf-8")
    reference = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert {n for n in fusewright.__all__ if f'id="fusewright.{n}"' not in reference} == set()
    for path in notebooks.NOTEBOOKS:
        page = (site / "notebooks" / path.stem / "index.html").read_text(encoding="utf-8")
        assert f"docs/notebooks/{path.name}" in page
        assert "colab.research.google.com" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js, to run the site's search")
def test_a_reader_finds_it_by_one_query(site: Path) -> None:
    command = ["node", str(Path(__file__).with_name("search.js")), str(site), *FOUND]
    answers = json.loads(subprocess.check_output(command, text=True))
    assert {query: (hits or [None])[0] for query, hits in answers.items()} == FOUND


@pytest.mark.real
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path) -> None:
    notebooks.run(path)
