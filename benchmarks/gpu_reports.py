"""A plugin for pytest: what has run is on disk at once, and a broken CUDA context is left.

    python -m pytest -p benchmarks.gpu_reports --reports PREFIX ...

Each test that ends is a line of ``PREFIX.jsonl``, and each failure is appended to
``PREFIX-failures.txt``: whatever ends pytest later, they are there. After an illegal access every
later test of a process fails. Such a process of pytest-xdist ends, and another one takes its place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from benchmarks.sticky import broken_context


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", default="", help="how the files of results begin")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "maxschedchunk"):  # of pytest-xdist; keeps the order of the tests
        config.option.maxschedchunk = 1
    if prefix := config.getoption("reports"):
        of_xdist = hasattr(config, "workerinput")
        config.pluginmanager.register(_LeaveBrokenContext(of_xdist))
        if not of_xdist:
            config.pluginmanager.register(_Reports(prefix))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By op, and before all the parity of each op in bf16."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, str]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    first = "parity" in item.name and str(parameters.get("dtype")) == "torch.bfloat16"
    return not first, str(parameters.get("name", item.path.stem)).partition("-")[0]


class _Reports:
    """Writes what becomes of tests, each at once."""

    def __init__(self, prefix: str) -> None:
        self.rows = Path(f"{prefix}.jsonl").open("w")  # noqa: SIM115  2026-12-01: as long as pytest
        self.failures = Path(f"{prefix}-failures.txt").open("w")  # noqa: SIM115  2026-12-01: same

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            row = {"test": report.nodeid, "outcome": report.outcome, "when": report.when}
            self._write(report, row | {"seconds": round(report.duration, 3)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, {"test": report.nodeid, "outcome": "failed", "when": "collect"})

    def _write(
        self, report: pytest.TestReport | pytest.CollectReport, row: dict[str, object]
    ) -> None:
        if report.failed:
            sections = "".join(f"--- {name}\n{text}\n" for name, text in report.sections)
            print(f"=== {report.nodeid}\n{report.longreprtext}\n{sections}", file=self.failures)
            self.failures.flush()
        print(json.dumps(row), file=self.rows, flush=True)


class _LeaveBrokenContext:
    """Ends a process whose context a test has broken.

    Args:
        replaced: whether another process takes its place.
    """

    def __init__(self, replaced: bool) -> None:
        self.replaced, self.failed = replaced, False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtest_logfinish(self) -> None:
        # before xdist counts the test as done: a process that ends takes no other test with it
        reason = broken_context() if self.failed else ""
        self.failed = False
        if reason and self.replaced:
            os._exit(70)
        if reason:
            self.session.shouldfail = f"nothing runs on the GPU any more: {reason}"
