"""Each file begins and ends without what others have captured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reset TorchDynamo, and let go of the models that a file keeps between its tests."""
    torch._dynamo.reset()
    yield
    pair = getattr(request.module, "_pair", None)
    if hasattr(pair, "cache_clear"):
        pair.cache_clear()
    torch._dynamo.reset()
