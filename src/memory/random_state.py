"""What a call changes besides its results, so that it can be made once more, or undone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of random numbers on the host and on a GPU; None where ``device`` is none."""

    device: torch.device
    host: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        gpu = None
        # while a CUDA graph is captured, its numbers have no state that could be asked for
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            gpu = torch.cuda.get_rng_state(device)
        return cls(device, torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Draw again what was drawn since."""
        torch.set_rng_state(self.host)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)
