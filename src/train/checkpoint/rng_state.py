"""The state of all random number generators that a training step may draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..processes.world import World


@dataclass(frozen=True)
class RngState:
    """The state of Python's, NumPy's and PyTorch's generators, on the CPU and on the GPU."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> RngState:
        """The current state."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Make this the state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Make this the state while the block runs."""
        current = RngState.now()
        self.restore()
        try:
            yield
        finally:
            current.restore()


@contextlib.contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Let all processes draw the same random numbers in the block, and different ones after it."""
    before = RngState.now()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        before.restore()


def seed_rank(seed: int, world: World) -> None:
    """Seed each process differently, for dropout, once the weights are initialized.

    Processes of one group draw the same: what each of them has whole must stay the same.
    """
    if world.several:
        torch.manual_seed(seed + world.batch_rank)


def share_in_groups(world: World) -> None:
    """Give the processes of each group the state of its first one; a collective.

    Those that read a checkpoint of another strategy would else draw different numbers.
    """
    if world.group > 1:
        first = world.rank - world.rank % world.group
        world.gather(RngState.now())[first].restore()
