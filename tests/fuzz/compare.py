"""Running a program eagerly and optimized, and judging what is observable of both against fp64."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.budget import EXCEEDS, errors, exceeded

from .program import Program, generate

_NOISE = 0.5
"""Relative error of eager's result above which it is nothing but rounding."""

_DRAWS = (12, 96)
"""How many batches judge together what fewer have found too far away.

The errors of a whole model are heavy-tailed, and one batch's are a matter of luck, for eager as for
ours. Over many batches luck evens out, and the factor of the budget needs no change.
"""

_EAGER_LIMITS = ("modified by an inplace operation", "is a view and is being modified inplace")
"""What autograd says of programs that eager cannot differentiate, and that ours may."""


@dataclass
class Failure:
    """How the optimized model differs from eager.

    Attributes:
        kind: ``"wrong value"``, ``"crash"``, ``"no error"``, ``"structure"``, ``"state"`` ...
        place: the step, and the result's name.
        detail: figures, or a traceback.
    """

    kind: str
    place: str
    detail: str


@dataclass
class Outcome:
    """What is observable of one step: results and gradients by name, and everything else."""

    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    trace: str = ""


def exact(source: str) -> str:
    """The program in fp64: whatever dtype it asks for is fp64, and autocast does nothing."""
    source = re.sub(r"torch\.autocast\([^)]*\)", "contextlib.nullcontext()", source)
    source = re.sub(r"torch\.(float32|bfloat16|float16)\b", "torch.float64", source)
    return source.replace(".float()", ".double()")


def load(source: str) -> dict[str, Any]:
    """Execute a program's source; returns its names."""
    space: dict[str, Any] = {"__name__": "fuzzed"}
    exec(compile(source, "<fuzzed>", "exec"), space)
    return space


class Runner:
    """One model in one of its forms, and the steps that it is taken through."""

    def __init__(self, program: Program, form: str) -> None:
        self.space = load(exact(program.source) if form == "exact" else program.source)
        self.model: nn.Module = self.space["build"]()

    def change(self, i: int) -> None:
        """Make a change."""
        self.space["CHANGES"][i](self.model)

    def step(self, i: int, batch: int) -> Outcome:
        """Run a step on a batch; the model's gradients are cleared before."""
        outcome = Outcome()
        self.model.zero_grad(set_to_none=True)
        self.space["LOG"].clear()
        torch.manual_seed(batch)
        try:
            results = self.space["STEPS"][i](self.model, batch)
        except Exception as error:
            outcome.error = type(error).__name__
            outcome.trace = traceback.format_exc(limit=-6)
            return outcome
        outcome.others["random state"] = torch.get_rng_state().tolist()
        outcome.others["calls of hooks"] = list(self.space["LOG"])
        outcome.others["results"] = sorted(results)
        for name, value in results.items():
            if isinstance(value, Tensor):
                outcome.tensors[name] = value.detach().clone()
                outcome.others[f"{name} needs a gradient"] = value.requires_grad
            else:
                outcome.others[name] = None if value is None else value
        self._state(outcome)
        return outcome

    def _state(self, outcome: Outcome) -> None:
        for name, p in self.model.named_parameters():
            outcome.tensors[f"gradient of {name}"] = None if p.grad is None else p.grad.clone()
            outcome.others[f"{name} requires_grad"] = p.requires_grad
        for name, b in self.model.named_buffers():
            outcome.tensors[f"buffer {name}"] = b.clone()
        outcome.others["training"] = [m.training for m in self.model.modules()]
        outcome.others["state_dict"] = sorted(self.model.state_dict())
        outcome.others["counters"] = [
            m.calls for m in self.model.modules() if isinstance(getattr(m, "calls", None), int)
        ]


def synchronise(source: nn.Module, *others: nn.Module) -> None:
    """Give all models the parameters, buffers and counters of ``source``."""
    for other in others:
        with torch.no_grad():
            for mine, theirs in (
                (source.parameters(), other.parameters()),
                (source.buffers(), other.buffers()),
            ):
                for a, b in zip(mine, theirs, strict=True):
                    b.data.copy_(a.data)


def draw(seed: int) -> Program:
    """The program of a seed: the first of its draws whose first step eager mode can run.

    One seed in ten keeps what eager refuses: then the optimized model must refuse it, too.
    """
    for attempt in range(50):
        program = generate(1000 * seed + attempt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner = Runner(program, "eager")
            for i in range(program.after):
                runner.change(i)
            refused = runner.step(program.after, program.after).error is not None
        if not refused or seed % 10 == 0:
            break
    return program


def check(program: Program, again: Callable[[], None] = torch._dynamo.reset) -> Failure | None:
    """Run a program in all forms.

    Args:
        program: the program.
        again: called first; forgets what other programs compiled.

    Returns:
        The first difference, or None.
    """
    again()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager, ours, oracle = (Runner(program, f) for f in ("eager", "ours", "exact"))
        synchronise(eager.model, ours.model, oracle.model)
        for i in range(program.after):
            for runner in (eager, ours, oracle):
                runner.change(i)
        try:
            optimize(ours.model, **program.options)  # type: ignore[arg-type]
        except Exception:
            return Failure("crash", "optimize", traceback.format_exc(limit=-4))
        return _steps(program, eager, ours, oracle)


def _steps(program: Program, eager: Runner, ours: Runner, oracle: Runner) -> Failure | None:
    for i in range(program.after, len(eager.space["STEPS"])):
        if i > program.after:
            for runner in (eager, ours, oracle):
                try:
                    runner.change(i - 1)
                except Exception:
                    if runner is eager:
                        return None  # such a change cannot be made to this model
                    return Failure("crash", f"change {i - 1}", traceback.format_exc(limit=-4))
        for batch in (i, 100 + i):  # the second call runs what the first one captured
            failure = _step(i, batch, eager, ours, oracle)
            if failure is not None:
                return failure if failure.kind != "end" else None
    return _restored(program, eager, ours)


def _step(i: int, batch: int, eager: Runner, ours: Runner, oracle: Runner) -> Failure | None:
    synchronise(eager.model, ours.model, oracle.model)
    outcomes = [r.step(i, batch) for r in (eager, ours, oracle)]
    failure = _judge(f"step {i}, batch {batch}", *outcomes)
    if failure is None or failure.kind != "too far":
        return failure
    drawn = [outcomes]
    for draws in _DRAWS:
        while len(drawn) < draws:
            synchronise(eager.model, ours.model, oracle.model)
            drawn.append([r.step(i, 1000 * len(drawn) + batch) for r in (eager, ours, oracle)])
        together = [_stacked([d[k] for d in drawn]) for k in range(3)]
        failure = _judge(f"step {i}, {draws} batches", *together)
        if failure is None or failure.kind != "too far":
            return failure
    failure.kind = "wrong value"
    return failure


def _stacked(outcomes: list[Outcome]) -> Outcome:
    """The tensors of several steps, each as one; what is no tensor is the first one's."""
    first = next((o for o in outcomes if o.error), outcomes[0])
    if first.error:
        return first
    tensors = {
        name: None if t is None else torch.stack([o.tensors[name] for o in outcomes])  # type: ignore[misc]
        for name, t in first.tensors.items()
    }
    return Outcome(tensors, first.others)


def _judge(place: str, eager: Outcome, ours: Outcome, oracle: Outcome) -> Failure | None:
    if eager.error is not None:
        if ours.error is None and not any(t in eager.trace for t in _EAGER_LIMITS):
            return Failure("no error", place, f"eager raises {eager.error}\n{eager.trace}")
        return Failure("end", place, "")
    if ours.error is not None:
        return Failure("crash", place, ours.trace)
    for name in eager.others.keys() | ours.others.keys():
        a, b = ours.others.get(name), eager.others.get(name)
        if a != b:
            said = "differs" if name == "random state" else f"{a} instead of {b}"
            return Failure("state", f"{place}, {name}", said)
    if oracle.error is not None:
        return Failure("end", place, "")  # the fp64 form cannot run: nothing to judge by
    for name, b in eager.tensors.items():
        a, o = ours.tensors.get(name), oracle.tensors.get(name)
        if (a is None) != (b is None):
            return Failure("structure", f"{place}, {name}", f"{a} instead of {b}")
        if a is None or b is None or o is None or torch.equal(a, b):
            continue
        if not b.is_floating_point():
            return Failure("wrong value", f"{place}, {name}", f"{a} instead of {b}")
        problem = exceeded(a, b, o)
        if problem is None or _is_noise(a, b, o):
            continue
        if "batches" in place and problem.startswith("peak"):
            continue  # the largest of thousands: what is wrong shows in the mean, too
        kind = "too far" if EXCEEDS in problem else "structure"
        return Failure(kind, f"{place}, {name}", problem)
    return None


def _is_noise(ours: Tensor, eager: Tensor, oracle: Tensor) -> bool:
    """Whether a result is nothing but rounding in eager, and is no larger in ours."""
    if ours.shape != eager.shape or not torch.isfinite(ours).all():
        return False
    return errors(eager, oracle).rms > _NOISE and bool(
        ours.double().norm() <= 3 * eager.double().norm() + 1e-30
    )


def _restored(program: Program, eager: Runner, ours: Runner) -> Failure | None:
    """After ``restore`` a step is eager's to the bit."""
    restore(ours.model)
    synchronise(eager.model, ours.model)
    last = len(eager.space["STEPS"]) - 1
    a, b = ours.step(last, 5), eager.step(last, 5)
    if a.error != b.error:
        return Failure("restore", "after restore", a.trace or f"eager raises {b.error}")
    for name, t in b.tensors.items():
        mine = a.tensors.get(name)
        if (mine is None) != (t is None) or (t is not None and not torch.equal(mine, t)):  # type: ignore[arg-type]
            return Failure("restore", f"after restore, {name}", "is not eager's to the bit")
    return None


def script(program: Program) -> str:
    """A script that runs the program and prints the difference."""
    return (
        "from tests.fuzz.compare import check\nfrom tests.fuzz.program import Program\n\n"
        f'SOURCE = r"""{program.source}"""\n'
        f"print(check(Program({program.seed}, SOURCE, {program.options!r}, {program.after})))\n"
    )
