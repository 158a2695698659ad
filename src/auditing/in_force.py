"""What was asked for and may silently be off in a loop: dropout, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .findings import AuditFinding, Verdict
from .force import NO_DROPOUT_MODULE, asked_of_adapters

_SHOWN = 8

# --- dropout --------------------------------------------------------------------------------------


class Dropout:
    """The dropout that a model is made with, as it is when a training step begins."""

    def __init__(self, model: nn.Module) -> None:
        self.of_adapters = asked_of_adapters(model)
        self.modules: dict[str, nn.Module] = {}
        self.functional: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd):
                if module.p > 0:
                    self.modules[name] = module
            elif any("dropout" in k and isinstance(v, float) and v > 0
                     for k, v in vars(module).items()):  # fmt: skip
                self.functional.append(name)
        self.training = model.training
        self.off = [n for n, m in self.modules.items() if not m.training]

    def finding(self, drew_random: bool | None, disabled: bool = False) -> AuditFinding:
        """Judge it, given whether the forward of a training step drew random numbers.

        Args:
            drew_random: None: it is not known.
            disabled: the trainer was asked to switch dropout off.
        """
        figures = {"modules": len(self.modules), "functional": len(self.functional)}
        if disabled:
            return AuditFinding(
                "dropout", "pass", "the trainer was asked to switch it off", figures=figures
            )
        if self.of_adapters and not self.modules:
            name, p = next(iter(self.of_adapters.items()))
            return AuditFinding(
                "dropout", "fail", f"{name} is {p:g}, and no module has a dropout", (),
                NO_DROPOUT_MODULE, figures,
            )  # fmt: skip
        if not self.modules and not self.functional:
            return AuditFinding("dropout", "pass", "none is asked for", figures=figures)
        adapters = [n for n in self.modules if "lora_dropout" in n] if self.of_adapters else []
        shown = tuple((adapters or [*self.modules, *self.functional])[:_SHOWN])
        if not self.training:
            return AuditFinding(
                "dropout", "fail", "the model is in evaluation mode while it is trained", shown,
                "call model.train() before the steps", figures,
            )  # fmt: skip
        off = [n for n in (adapters or self.modules) if n in self.off]
        if off and len(off) == len(adapters or self.modules):
            return AuditFinding(
                "dropout",
                "fail",
                f"all {len(off)} modules with a dropout are in evaluation mode",
                tuple(off[:_SHOWN]),
                figures=figures,
            )
        if drew_random is None:
            return AuditFinding(
                "dropout", "skipped", "the calls of the model were not seen", figures=figures
            )
        if not drew_random:
            return AuditFinding(
                "dropout", "fail", "a training forward draws no random numbers", shown,
                "a patched layer leaves dropout out: train without that patch", figures,
            )  # fmt: skip
        return AuditFinding(
            "dropout",
            "pass",
            f"{len(self.modules)} modules with a dropout are in "
            "training mode, and random numbers are drawn",
            figures=figures,
        )


# --- the schedule ---------------------------------------------------------------------------------


class Rates:
    """The learning rates of the optimizer's steps, as shares of those that each group began with.

    Attributes:
        first: number of the first step, from 0; another one in a run that resumes.
        used: of each step the share of its first group; other groups follow the same schedule.
    """

    def __init__(self, optimizers: Sequence[Any], scheduler: Any = None, first: int = 0) -> None:
        self._groups = [g for o in optimizers for g in o.param_groups]
        self.scheduler, self.first = scheduler, first
        self.used: list[float] = []
        self.counts: list[int | None] = []

    @property
    def base(self) -> float:
        """The learning rate that the shares are of."""
        group = self._groups[0] if self._groups else {}
        return float(group.get("initial_lr", group.get("lr", 0.0)))

    def note(self) -> None:
        """A step is about to be made."""
        self.used.append(float(self._groups[0]["lr"]) if self._groups else 0.0)
        count = getattr(getattr(self.scheduler, "scheduler", self.scheduler), "last_epoch", None)
        self.counts.append(count if isinstance(count, int) else None)

    def finding(
        self, expected: Sequence[float] | None, asked: str, warmup: int = 0
    ) -> AuditFinding:
        """Compare with the rates that were asked for.

        Args:
            expected: of steps 0, 1, ... of the whole run; None: nobody says.
            asked: the schedule in words, or why nothing can be compared.
            warmup: its steps of warmup; 0: none, or unknown.
        """
        used = self.used
        figures: dict[str, Any] = {"steps": len(used), "first": used[:5], "last": used[-3:]}
        text = self._wrong_steps(warmup) if expected is None else _difference(
            used, expected, self.first, warmup, asked
        )  # fmt: skip
        each = self._each()
        if text:
            advice = ""
            if each > 1:
                text += f"; the scheduler is stepped {each:.3g} times for each step"
                advice = "step it once, after optimizer.step(): not for each batch or process"
            return AuditFinding("warmup", "fail", text, advice=advice, figures=figures)
        if expected is None:
            if warmup:
                asked = f"the first steps warm up, over {warmup}"
            elif each > 1:
                asked += f"; the scheduler is stepped {each:.3g} times for each step"
            verdict: Verdict = "pass" if warmup and len(used) > warmup else "skipped"
            return AuditFinding("warmup", verdict, asked, figures=figures)
        return AuditFinding(
            "warmup",
            "pass",
            f"{len(used)} step{'s' * (len(used) != 1)} used the rates of {asked}",
            figures=figures,
        )

    def _each(self) -> float:
        """How often the scheduler was stepped for each step of the optimizer; 0: unknown."""
        known = [(i, c) for i, c in enumerate(self.counts) if c is not None]
        if len(known) < 2:
            return 0.0
        (i, before), (j, after) = known[0], known[-1]
        return (after - before) / (j - i)

    def _wrong_steps(self, warmup: int) -> str:
        """What is wrong with the rates of a loop that only says how long it warms up; or empty."""
        used, base = self.used, self.base
        if warmup > 1 and used and not self.first:
            if used[0] > 0.99 * base:
                return (
                    f"the first step has the whole learning rate, and {warmup} steps of warmup "
                    "are asked for"
                )
            early = next((i for i, r in enumerate(used) if r > 0.99 * base), warmup)
            if early < 0.7 * warmup - 1:
                return f"the warmup of {warmup} steps ends at step {early + 1}"
            if len(used) > 2 * warmup and max(used) < 0.5 * base:
                return f"after {len(used)} steps the learning rate has not warmed up"
        planned = _planned_steps(self.scheduler)
        last = next((c for c in reversed(self.counts) if c is not None), 0)
        if planned and self._each() > 1 and last > 1.05 * planned:
            return f"the schedule is made for {planned} steps, and {last} were taken of it"
        return ""


def _difference(
    used: Sequence[float], expected: Sequence[float], first: int, warmup: int, asked: str
) -> str:
    """The first step whose rate is not the expected one, in words; or empty."""
    top = max([*expected, *used, 1e-30])
    for step, rate in enumerate(used, first):
        if step < len(expected) and not math.isclose(
            rate, expected[step], rel_tol=1e-4, abs_tol=1e-6 * top
        ):
            text = f"step {step + 1} used {rate:.3g} where {asked} has {expected[step]:.3g}"
            if step < warmup and rate > expected[step]:
                text += ": there is no warmup, or a shorter one"
            elif rate > expected[step]:
                text += ": it does not decay, or later"
            return text
    return ""


def _planned_steps(scheduler: Any) -> int | None:
    """For how many steps a scheduler of transformers was made."""
    inner = getattr(scheduler, "scheduler", scheduler)
    factor = next(iter(getattr(inner, "lr_lambdas", None) or ()), None)
    planned = getattr(factor, "keywords", {}).get("num_training_steps")
    return planned if isinstance(planned, int) else None
