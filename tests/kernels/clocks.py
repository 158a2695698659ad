"""Races without a clock of their own: candidates say how long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fusewright.kernels import choice
from fusewright.kernels.choice import Contender


class Clock:
    """A clock that candidates move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def candidate(
        self, name: str, seconds: float, result: Callable[[Tensor], Any] = lambda x: 2 * x
    ) -> Contender:
        def run(x: Tensor) -> Any:
            self.now += seconds
            return result(x)

        return Contender(name, run)


@contextmanager
def own_choices(folder: Path) -> Iterator[None]:
    """Choices that nobody has made before, and that nobody sees later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "ops")
        patch.setattr(choice, "_CHOICES", {})
        patch.setattr(choice, "_KEPT", {})
        patch.setattr(choice, "_spent", choice._Spent())
        patch.setattr(choice, "kept_folder", lambda: folder)
        patch.setattr(choice, "_switches", lambda: 0)  # tests run beside each other
        yield


def raise_error(error: Exception) -> Callable[[Tensor], Any]:
    """A candidate's function that fails."""

    def run(x: Tensor) -> Any:
        raise error

    return run
