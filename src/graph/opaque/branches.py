"""A condition on a tensor's value, as one node of a graph that was captured as if it held."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor

Place = tuple[str, int, int]
"""Of a condition in the source: its file, line and column."""


class OtherThanCaptured(TorchDynamoException):
    """A graph finds that this call does something else than what was captured."""


class BranchChanged(OtherThanCaptured):
    """A value says that the other branch is taken."""

    def __init__(self, place: Place) -> None:
        """At this place of the source."""
        super().__init__(f"the branch in line {place[1]} of {place[0]} is taken the other way")
        self.place = place


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-11-30: no types
def held_branch(value: Tensor, taken: bool, place: Place) -> Tensor:
    """``value``, where its truth is ``taken``. Raises BranchChanged where it is not.

    As ``if value`` does, it waits for a device that computes the value.
    """
    if not isinstance(value, FakeTensor) and bool(value.detach()) is not taken:
        raise BranchChanged(place)
    return value.detach()
