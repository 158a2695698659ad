"""float16 with scaled losses on a CPU, where accelerate has it for GPUs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

from fusewright.train.model import precision


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this CPU train in float16 with PyTorch's scaler for CPUs; takes the scaler's arguments.

    All else is accelerate's and Trainer's: autocast, scaling, clipping, steps that are skipped.
    """
    arguments: dict[str, Any] = {}
    plain = accelerate.Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **arguments)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(precision, "scales_losses", lambda: True)
    return arguments.update
