"""What holds for every test: GPU tests need a GPU, and no more threads than cores."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: also those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


_LONG = frozenset(Path(__file__).with_name("long.txt").read_text().splitlines())
"""Tests that took several seconds each on two busy cores; CI runs them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in _LONG:
            item.add_marker("long")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU (torch.cuda.is_available() is False)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _kernels_must_launch(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, what computes an op in plain PyTorch because its kernel failed passes no test."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from fusewright.kernels.fallback import no_fallback

    with no_fallback():
        yield


@pytest.fixture
def choose_for() -> Iterator[Callable[[str], None]]:
    """Lets what a test runs choose for another kind of processor, by its name in ``KINDS``."""
    from fusewright.kernels.processor import KINDS, assume

    with contextlib.ExitStack() as until_the_end:
        yield lambda kind: until_the_end.enter_context(assume(KINDS[kind]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Take what the last file left out of the garbage collector's sight.

    Trainer and accelerate collect several times a run, and look at every object of every imported
    module each time.
    """
    if item.path != _last_file.get("path"):
        _last_file["path"] = item.path
        gc.collect()
        gc.freeze()


_last_file: dict[str, object] = {}


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden graphs anew")
