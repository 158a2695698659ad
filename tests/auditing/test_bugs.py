"""Published bugs are found, by the right name; their healthy twins pass."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from .bugs import BUGS, PAGE, Bug, page

# one of each kind; the others are as quick, but there are many
QUICK = {
    "last-turn-mask", "doubled-head", "delta-rule-past-the-first-row", "inert-expert-adapters",
    "experts-left-frozen", "pad-is-eos", "samples-see-each-other",
}  # fmt: skip


def _marked(bug: Bug) -> object:
    return pytest.param(bug, id=bug.name, marks=[] if bug.name in QUICK else [pytest.mark.long])


@pytest.mark.parametrize("bug", map(_marked, BUGS))
def test_a_published_bug_is_found_by_its_name_and_its_healthy_twin_passes(bug: Bug) -> None:
    with ExitStack() as end:
        found = bug.build(True, end).audit()
    assert bug.check in [f.check for f in found.failed]
    with ExitStack() as end:
        healthy = bug.build(False, end).audit()
    assert healthy.passed, [f"{f.check}: {f.reason}" for f in healthy.failed]
    answers = {f.check: f.verdict for f in healthy.findings}
    assert answers[bug.check] == "pass"


def test_the_page_has_every_bug() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 24


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs pip install liger-kernel"
)
def test_what_the_real_liger_has_patched_is_judged_as_it_is() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.auditing.liger"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    failed = {
        name: [f["check"] for f in audit["findings"] if f["verdict"] == "fail"]
        for name, audit in found.items()
    }
    assert "adapter-reach" in failed.pop("adapter_of_the_head")
    assert set(failed) == {"instance", "classes", "router"}
    assert not any(failed.values())
