"""Ending a run whose loss stays too high, or is NaN or infinite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..processes.world import World
from ..recipe.recipe import Recipe


class LossWatchdog(TrainerCallback, ExportableState):
    """Ends training after ``patience`` logged losses in a row above ``threshold``.

    Attributes:
        violations: how many there were in a row until now; checkpoints keep it.
    """

    def __init__(self, threshold: float, patience: int) -> None:
        self.threshold, self.patience, self.violations = threshold, patience, 0

    @property
    def tripped(self) -> bool:
        """Whether it has ended the run."""
        return self.violations >= self.patience

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count violations."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is None:
            return
        self.violations = self.violations + 1 if float(loss) > self.threshold else 0
        control.should_training_stop |= self.tripped

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"threshold": self.threshold, "patience": self.patience},
            "attributes": {"violations": self.violations},
        }


_PATIENCE = 3
"""The loss watchdog's default."""


def watchdogs(recipe: Recipe) -> list[LossWatchdog | EarlyStoppingCallback]:
    """The watchdogs that the recipe asks for."""
    callbacks: list[LossWatchdog | EarlyStoppingCallback] = []
    if recipe.loss_watchdog_threshold is not None:
        patience = recipe.loss_watchdog_patience or _PATIENCE
        callbacks.append(LossWatchdog(recipe.loss_watchdog_threshold, patience))
    if recipe.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    return callbacks


def apply_limits(states: dict[str, Any], recipe: Recipe) -> None:
    """Give restored watchdogs the limits of the recipe, in place of the checkpoint's.

    ``states`` has a checkpoint's state of each callback by class name, and is changed in place.
    """
    for watchdog in watchdogs(recipe):
        name = type(watchdog).__name__
        if name in states:
            states[name] = {**states[name], "args": watchdog.state()["args"]}


def out_of_patience(states: dict[str, Any], recipe: Recipe) -> bool:
    """Whether early stopping had ended the run of a checkpoint, and would by this recipe.

    ``states`` has the checkpoint's state of each callback by class name.
    """
    early_stopping = states.get(EarlyStoppingCallback.__name__, {})
    waited = early_stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    patience = early_stopping.get("args", {}).get("early_stopping_patience")
    if patience is None or recipe.early_stopping_patience is None:
        return False
    return bool(waited >= max(patience, recipe.early_stopping_patience))


_TEXTS = ("input_ids", "prompt_ids", "completion_ids")
"""Endings of the names of token tensors; a row may have several."""


class NonFiniteStepError(Exception):
    """A step whose loss or gradient is not finite; its update was not made.

    Attributes:
        step: its number, from 1.
        what: ``"loss"`` or ``"gradient norm"``.
        batches: the inputs of the step's forward passes.
        scale: of the loss in float16, which has fallen too low; None: the loss is not scaled.
    """

    def __init__(self, step: int, what: str, value: float, seen: _Seen) -> None:
        text = f"step {step}: the {what} is {value}"
        if seen.scale is not None:
            text += (
                f", and a scale of {seen.scale:g} does not help: the model leaves the range of "
                "float16 (set bf16: true where there is bfloat16, else float32: true)"
            )
        super().__init__(text)
        self.step, self.what, self.value = step, what, value
        self.batches, self.losses = seen.batches, [float(loss) for loss in seen.losses]
        self.scale = seen.scale

    def __reduce__(self) -> tuple[Any, ...]:
        batches = [{name: value.cpu() for name, value in b.items()} for b in self.batches]
        losses = [torch.tensor(loss) for loss in self.losses]
        seen = _Seen(self.step, batches, losses, scale=self.scale)
        return type(self), (self.step, self.what, self.value, seen)

    def of_all(self, world: World) -> NonFiniteStepError:
        """The error to report: from a process whose own loss is not finite; a collective."""
        errors = world.gather(self if self.what == "loss" else None)
        return next((error for error in errors if error is not None), self)

    def save(self, folder: Path, tokenizer: Any) -> Path:
        """Write the inputs as tensors and as text, and return the text file.

        ``nan-batch-STEP.safetensors`` has ``0.input_ids``, ``0.labels`` and so on, with the number
        of the forward pass first; ``nan-batch-STEP.txt`` has the text of each row.
        """
        from safetensors.torch import save_file

        tensors = {
            f"{i}.{name}": value.detach().cpu().clone()
            for i, batch in enumerate(self.batches)
            for name, value in batch.items()
        }
        stem = folder / f"nan-batch-{self.step}"
        losses = {"losses": ", ".join(map(str, self.losses)), "step": str(self.step)}
        save_file(tensors, stem.with_suffix(".safetensors"), metadata=losses)
        lines = [str(self)]
        for i, (batch, loss) in enumerate(zip(self.batches, self.losses, strict=True)):
            texts = [t.tolist() for name, t in batch.items() if name.endswith(_TEXTS)]
            for j, parts in enumerate(zip(*texts, strict=True)):
                lines.append(f"\n--- forward pass {i}, row {j}, loss of the forward pass {loss}\n")
                lines += [tokenizer.decode(ids) for ids in parts]
        path = stem.with_suffix(".txt")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


@dataclass
class _Seen:
    """A step's inputs, its losses, the norm of its gradient, and the scale of its loss."""

    step: int
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None
    scale: float | None = None


_LEAST_SCALE = 1.0
"""Of the loss in float16. It begins at 65,536, and halves with each step that is not finite."""


class NonFiniteGuard:
    """Checks the loss and the gradient of every step before the optimizer does.

    On a CPU, and before logged steps, it reads the numbers. On a GPU that would make the host wait:
    between logged steps, the optimizer is set to skip the update on the device if the gradient is
    not finite (as with loss scaling), and the guard reads the numbers when the trainer logs.
    """

    def __init__(self) -> None:
        self._steps: list[_Seen] = []

    def add(self, step: int, batch: dict[str, Tensor], loss: Tensor) -> None:
        """Record a forward pass of ``step``, which is counted from 1."""
        if not self._steps or self._steps[-1].step != step:
            self._steps.append(_Seen(step))
        self._steps[-1].batches.append(batch)
        self._steps[-1].losses.append(loss.detach())

    def judge(self, norm: Any, optimizer: Any, logged: bool) -> Any:
        """Check the norm of the gradient, a tensor or a number, before the optimizer's step.

        Not to be called where a loss scaler skips such steps by itself: see ``judge_scaled``.
        Returns ``norm``, as a number where it was read.

        Raises:
            NonFiniteStepError: it is not finite, or the loss is not.
        """
        vars(optimizer).pop("found_inf", None)
        self._steps[-1].norm = norm if torch.is_tensor(norm) else torch.tensor(float(norm))
        waits = torch.is_tensor(norm) and norm.device.type != "cpu"
        if waits and not logged and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)
            return norm
        self.look()
        return float(norm)

    def judge_scaled(self, norm: Any, scaler: Any, logged: bool) -> Any:
        """Check a step of a scaled loss, which is skipped where it is not finite; returns ``norm``.

        At first that happens often. It goes on for ever, and nothing is trained, where the forward
        pass leaves the range of float16: its scale then falls below any that is of use.

        Raises:
            NonFiniteStepError: such a step, when the trainer logs.
        """
        seen, self._steps = self._steps[-1], []
        if logged and (scale := scaler.get_scale()) < _LEAST_SCALE:
            seen.norm = norm if torch.is_tensor(norm) else torch.tensor(float(norm))
            seen.scale, self._steps = scale, [seen]
            self.look()
        return norm

    def look(self) -> None:
        """Raise NonFiniteStepError for the first step since the last call that is not finite."""
        steps, self._steps = self._steps, []
        for seen in steps:
            # a NaN loss has a NaN gradient: one check is enough
            if seen.norm is not None and math.isfinite(float(seen.norm)):
                continue
            losses = torch.stack(seen.losses).tolist()
            bad = [loss for loss in losses if not math.isfinite(loss)]
            if bad:
                raise NonFiniteStepError(seen.step, "loss", bad[0], seen)
            if seen.norm is not None:
                raise NonFiniteStepError(seen.step, "gradient norm", float(seen.norm), seen)
