"""What a captured head has run already, should its capture fail.

Its backbone, or the first of its blocks, may have run by then. The original code is given what they
have returned, and finds the random numbers as they have left them: nothing runs, counts, writes or
draws twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...memory.random_state import RandomState


class Replay:
    """One call of a head: first it is noted what runs, then that is given again.

    Attributes:
        is_on: whether the original code runs now.
        is_labelled: whether the head was called with labels.
    """

    def __init__(self, device: torch.device, is_labelled: bool = True) -> None:
        """Note the random numbers of ``device`` and of the host."""
        self.is_on, self.is_labelled = False, is_labelled
        self._start = RandomState.now(device)
        self._ran: list[tuple[nn.Module, Any, RandomState]] = []

    def note(self, module: nn.Module, results: Any) -> None:
        """A part of the head has run."""
        now = RandomState.now(self._start.device)
        self._ran.append((module, results, now))

    def start(self) -> None:
        """The original code runs from here on."""
        self.is_on = True
        self._ran.reverse()
        self._start.restore()

    def take(self, module: nn.Module) -> tuple[Any] | None:
        """What ``module`` has returned, in a tuple; None if it has not run."""
        if not self._ran or self._ran[-1][0] is not module:
            self._ran.clear()
            return None
        _, results, after = self._ran.pop()
        after.restore()
        return (results,)
