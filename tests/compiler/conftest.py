"""Each file begins and ends without what others have captured."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reset TorchDynamo, and let go of the models that a file keeps between its tests."""
    torch._dynamo.reset()
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    torch._dynamo.reset()
