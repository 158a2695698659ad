"""What runs leave behind, compared; and runs that are stopped on their way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusewright.train.report.result import RunResult
from fusewright.train.trainer.engine import FlowCallback


def weights(folder: Path) -> dict[str, Tensor]:
    """The adapter, or the model, in a folder."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return load_file(folder / name)
    raise FileNotFoundError(folder)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two models."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two models are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def assert_same(one: Path, other: Path) -> None:
    """The models in two folders are equal bit for bit, and have learnt something."""
    found = weights(one)
    assert same(found, weights(other))
    assert any(bool(t.any()) for name, t in found.items() if "lora_B" in name or "lora" not in name)


def curves(result: RunResult) -> list[dict[str, float]]:
    """The history without what depends on the clock and the machine."""
    clock = {"trained_tokens_per_s", "time", "rss_mb", "cuda_mb", "mfu", "step_time"}
    return [{k: v for k, v in entry.items() if k not in clock} for entry in result.history]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, event: str) -> None:
    """Send SIGTERM once ``step`` steps are done, at the given event of the trainer."""

    def then(watch: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(watch, args, state, control, **kwargs)

    original = getattr(FlowCallback, event)
    monkeypatch.setattr(FlowCallback, event, then)
