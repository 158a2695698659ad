"""What holds for every test: GPU tests need a GPU, and no more threads than cores."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: also those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU (torch.cuda.is_available() is False)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden graphs anew")
