"""When a run goes wrong by itself: a loss that stays too high, or that is NaN or infinite."""

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
    """Ends training when the logged loss was above a threshold several times in a row.

    Args:
        threshold: a loss above it is bad.
        patience: how many bad ones in a row end the run.

    Attributes:
        violations: how many there were in a row until now. Checkpoints keep it.
    """

    def __init__(self, threshold: float, patience: int) -> None:
        self.threshold, self.patience, self.violations = threshold, patience, 0

    @property
    def tripped(self) -> bool:
        """Whether it has ended the run."""
        return self.violations >= self.patience

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
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
"""Of the loss watchdog, where the recipe does not say."""


def watchdogs(recipe: Recipe) -> list[LossWatchdog | EarlyStoppingCallback]:
    """The watchdogs that the recipe asks for."""
    found: list[LossWatchdog | EarlyStoppingCallback] = []
    if recipe.loss_watchdog_threshold is not None:
        patience = recipe.loss_watchdog_patience or _PATIENCE
        found.append(LossWatchdog(recipe.loss_watchdog_threshold, patience))
    if recipe.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    return found


def apply_limits(kept: dict[str, Any], recipe: Recipe) -> None:
    """Give restored watchdogs the limits of the recipe: a checkpoint brings its own along.

    Args:
        kept: what a checkpoint keeps of each callback, by the name of its class; changed in place.
        recipe: which may have other limits than the checkpoint's.
    """
    for watchdog in watchdogs(recipe):
        name = type(watchdog).__name__
        if name in kept:
            kept[name] = {**kept[name], "args": watchdog.state()["args"]}


def out_of_patience(kept: dict[str, Any], recipe: Recipe) -> bool:
    """Whether early stopping had ended the run that a checkpoint is of.

    Args:
        kept: what the checkpoint keeps of each callback, by the name of its class.
        recipe: which may have more patience, or no early stopping any more.
    """
    found = kept.get(EarlyStoppingCallback.__name__, {})
    waited = found.get("attributes", {}).get("early_stopping_patience_counter", 0)
    patience = found.get("args", {}).get("early_stopping_patience")
    if patience is None or recipe.early_stopping_patience is None:
        return False
    return bool(waited >= max(patience, recipe.early_stopping_patience))


_TEXTS = ("input_ids", "prompt_ids", "completion_ids")
"""How the names of tensors of tokens end; a row may have several."""


class NonFiniteStepError(Exception):
    """A step whose loss or gradient is not a finite number; its update was not made.

    Attributes:
        step: its number, from 1.
        what: ``"loss"`` or ``"gradient norm"``.
        value: what that was.
        batches: the inputs of the step's forward passes.
        losses: of these.
    """

    def __init__(self, step: int, what: str, value: float, seen: _Seen) -> None:
        super().__init__(f"step {step}: the {what} is {value}")
        self.step, self.what, self.value = step, what, value
        self.batches, self.losses = seen.batches, [float(loss) for loss in seen.losses]

    def __reduce__(self) -> tuple[Any, ...]:
        batches = [{name: value.cpu() for name, value in b.items()} for b in self.batches]
        seen = _Seen(self.step, batches, [torch.tensor(loss) for loss in self.losses])
        return type(self), (self.step, self.what, self.value, seen)

    def of_all(self, world: World) -> NonFiniteStepError:
        """The one to report: that of a process whose own loss is not finite; a collective."""
        found = world.gather(self if self.what == "loss" else None)
        return next((error for error in found if error is not None), self)

    def save(self, folder: Path, tokenizer: Any) -> Path:
        """Write the inputs, as tensors and as text.

        ``nan-batch-STEP.safetensors`` has ``0.input_ids``, ``0.labels`` and so on, with the number
        of the forward pass first; ``nan-batch-STEP.txt`` has the text of each row.

        Returns:
            The text file.
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
    """A step's inputs, its losses, and the length of its gradient."""

    step: int
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None


class NonFiniteGuard:
    """Looks at the loss and the gradient of every step before the optimizer does.

    On a CPU, and before steps that are logged anyway, it looks at the numbers. Between them, on a
    GPU, looking would make the host wait: there the optimizer is set to leave everything as it is
    if the gradient is not finite (as with loss scaling, on the device), and the guard looks when
    the trainer logs.
    """

    def __init__(self) -> None:
        self._steps: list[_Seen] = []

    def add(self, step: int, batch: dict[str, Tensor], loss: Tensor) -> None:
        """Note a forward pass of ``step``, which is counted from 1."""
        if not self._steps or self._steps[-1].step != step:
            self._steps.append(_Seen(step))
        self._steps[-1].batches.append(batch)
        self._steps[-1].losses.append(loss.detach())

    def judge(self, norm: Any, optimizer: Any, logged: bool) -> Any:
        """Look at the gradient's length before the optimizer's step.

        Not to be called where a loss scaler skips steps with infinite gradients by itself.

        Args:
            norm: a tensor or a number.
            optimizer: which is about to step.
            logged: whether the trainer logs this step.

        Returns:
            ``norm``; as a number where it has been looked at.

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

    def look(self) -> None:
        """Look at all steps since the last look.

        Raises:
            NonFiniteStepError: the first of them that is not finite.
        """
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
