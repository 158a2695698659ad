"""A trainer that keeps what is compared: losses, gradients, the change of the weights, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..report.environment import memory
from ..trainer.engine import EngineMixin

GRADIENTS, CHANGES = "gradients.safetensors", "changes.safetensors"
_START = "start.safetensors"

MOST = 2**26
"""Trained weights up to which all are compared; of more, so many, evenly chosen."""


def compared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a model, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def stride_of(model: nn.Module) -> int:
    """Of how many trained weights one is compared; an odd number, so that columns take turns."""
    number = sum(p.numel() for _, p in compared(model))
    return 1 if number <= MOST else -(-number // MOST) | 1


def chosen_elements(tensor: Tensor, stride: int) -> Tensor:
    """A copy of every ``stride``-th element, in the memory of the CPU; of shards, a collective."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().reshape(-1)[::stride].to("cpu", copy=True)


class ProofTrainer(EngineMixin, Trainer):
    """A trainer that keeps each step's loss and gradient norm, and the first one's gradients.

    Gradients are written before they are clipped. Set ``record`` before ``train``.
    """

    record: Record

    def on_step_begin(self) -> None:
        """Begin the sum of the step's losses."""
        super().on_step_begin()
        self.record.losses.append(0.0)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; what it returns is the batch's share of the step's loss."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.record.losses[-1] += float(loss)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._keep_gradients()
        clip: Any = super()._clip_grad_norm
        return clip(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._keep_gradients()
        norm = super()._get_grad_norm(model, grad_norm)
        self.record.norms.append(float(norm))
        return norm

    def _keep_gradients(self) -> None:
        if self.state.global_step == 0:
            scaler = self.accelerator.scaler
            self.record.keep_gradients(1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self) -> None:
        """Make the loss that of all processes, and tell of the step."""
        super().on_step_end()
        losses, world = self.record.losses, self.world
        losses[-1] = world.sums([losses[-1]])[0] / world.batch_ranks
        if world.main:
            seconds = self.context.meter.seconds[-1]
            print(
                f"step {len(losses)} of {self.args.max_steps}: loss {losses[-1]:.4f}, "
                f"{seconds:.1f} s",
                flush=True,
            )


class Record:
    """What one way has done.

    Args:
        model: with all adapters, before it is optimized or wrapped.
        folder: where tensors are written, by rank 0.
        main: whether this is rank 0.

    Attributes:
        losses: per trained token, of each step.
        norms: of each step's gradients, before they are clipped.
        stride: of how many trained weights one is compared.
    """

    def __init__(self, model: nn.Module, folder: Path, main: bool) -> None:
        self.model, self.folder, self.main = model, folder, main
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.stride = stride_of(model)
        self._write(_START, {name: p.data for name, p in compared(model)})

    def keep_gradients(self, scale: float) -> None:
        """Write the gradients as they are now; those of sharded weights are a collective.

        Args:
            scale: that the loss was multiplied with.
        """
        found = {name: p.grad for name, p in compared(self.model) if p.grad is not None}
        self._write(GRADIENTS, found, scale)

    def keep_changes(self) -> None:
        """Write how far the weights are from where they began."""
        now = {name: chosen_elements(p.data, self.stride) for name, p in compared(self.model)}
        if self.main:
            start = load_file(self.folder / _START)
            # in fp64: the difference of two near numbers
            changes = {name: (w.double() - start[name].double()) for name, w in now.items()}
            save_file(changes, self.folder / CHANGES)
            (self.folder / _START).unlink()

    def _write(self, name: str, tensors: dict[str, Tensor], scale: float = 1.0) -> None:
        found = {key: chosen_elements(t, self.stride) for key, t in tensors.items()}
        if scale != 1.0:
            found = {key: t.float() / scale for key, t in found.items()}
        if self.main:
            save_file(found, self.folder / name)


class PeakMemory:
    """The largest memory in use since this was made.

    Loading has peaks of its own (a GGUF file is unpacked), so the system's high-water mark is set
    back. Where that cannot be done, the mark is the whole process's.
    """

    def __init__(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """In MiB: ``rss_mb``, and ``cuda_mb`` on a GPU."""
        return memory()
