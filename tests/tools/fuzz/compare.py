"""Running a program eagerly and optimized, and judging what is observable of both against fp64."""

from __future__ import annotations

import itertools
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import optimize, restore

from .judge import DRAWS, EAGER_LIMITS, Failure, Outcome, judge, stacked
from .program import Program, generate


def exact(source: str) -> str:
    """The program in fp64: whatever dtype it asks for is fp64, and autocast does nothing."""
    source = re.sub(r"torch\.autocast\([^)]*\)", "contextlib.nullcontext()", source)
    source = re.sub(r"torch\.(float32|bfloat16|float16)\b", "torch.float64", source)
    return source.replace(".float()", ".double()")


def unchecked(source: str) -> str:
    """The program without checkpoints: what they would run is run."""
    own = "def checkpoint(function, *args, **kwargs):\n    return function(*args)\n"
    return source.replace("from torch.utils.checkpoint import checkpoint\n", own)


_FORMS = {"exact": exact, "unchecked": unchecked}


def load(source: str) -> dict[str, Any]:
    """Execute a program's source as a module; returns its names."""
    # each under a name of its own: PyTorch 2.11 looks for a function's globals by it
    module = types.ModuleType(f"fuzzed_{next(_NUMBERS)}")
    sys.modules[module.__name__] = module
    exec(compile(source, "<fuzzed>", "exec"), vars(module))
    return vars(module)


_NUMBERS = itertools.count()


class Runner:
    """One model in one of its forms, and the steps that it is taken through."""

    def __init__(self, program: Program, form: str) -> None:
        self.space = load(_FORMS.get(form, str)(program.source))
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
        outcome.others["modes"] = torch.is_grad_enabled(), torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
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


def perturb(model: nn.Module, seed: int) -> None:
    """Change all of the model's parameters by about a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=generator)
            p.data.mul_((1 + 0.1 * noise).to(p.dtype))


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
            if failure is not None and _is_eagers_own(program, failure, i, batch):
                return None
            if failure is not None:
                return failure if failure.kind != "end" else None
    return _restored(program, eager, ours)


def _is_eagers_own(program: Program, failure: Failure, i: int, batch: int) -> bool:
    """Whether a checkpoint gives eager mode other gradients or counters than there are without it.

    It hides a write after backward's formula has read the value: autograd refuses that elsewhere.
    Inside another checkpoint it computes again from what was written into its input since, and says
    nothing; ours are then the gradients without it. And what its function counts is counted once
    more, and read, when it runs again. That excuses no crash, and no other difference.
    """
    of_values = failure.kind in ("wrong value", "structure") or failure.place.endswith("counters")
    if "checkpoint(" not in program.source or not of_values:
        return False
    found = []
    for form in ("eager", "unchecked", "ours"):
        runner = Runner(program, form)
        for change in range(i):
            runner.change(change)
        if form == "ours":
            optimize(runner.model, **program.options)  # type: ignore[arg-type]
        found.append(runner.step(i, batch))
    if any(limit in found[1].trace for limit in EAGER_LIMITS):
        return True
    counters = [o.others["counters"] for o in found[:2] if o.error is None]
    counted_twice = len(counters) == 2 and counters[0] != counters[1]
    name = failure.place.rpartition(", ")[2]
    eager, unchecked, ours = (o.tensors.get(name) for o in found)
    if eager is None or unchecked is None or ours is None:
        return counted_twice
    far, near = ((t.double() - unchecked.double()).norm() for t in (eager, ours))
    return counted_twice or bool(near < far / 10)


def _step(i: int, batch: int, eager: Runner, ours: Runner, oracle: Runner) -> Failure | None:
    synchronise(eager.model, ours.model, oracle.model)
    outcomes = [r.step(i, batch) for r in (eager, ours, oracle)]
    failure = judge(f"step {i}, batch {batch}", *outcomes)
    if failure is None or failure.kind != "too far":
        return failure
    weights = [p.detach().clone() for p in eager.model.parameters()]
    drawn = [outcomes]
    for draws in DRAWS:
        while len(drawn) < draws:
            perturb(eager.model, len(drawn))
            synchronise(eager.model, ours.model, oracle.model)
            drawn.append([r.step(i, 1000 * len(drawn) + batch) for r in (eager, ours, oracle)])
            for p, before in zip(eager.model.parameters(), weights, strict=True):
                p.data.copy_(before)
        together = [stacked([d[k] for d in drawn]) for k in range(3)]
        failure = judge(f"step {i}, {draws} draws", *together)
        if failure is None or failure.kind != "too far":
            return failure
    failure.kind = "wrong value"
    return failure


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
        if (mine is None) != (t is None) or (t is not None and not _same_bits(mine, t)):
            return Failure("restore", f"after restore, {name}", "is not eager's to the bit")
    return None


def _same_bits(a: Tensor | None, b: Tensor) -> bool:
    """Whether two results are the same; NaN is NaN."""
    return a is not None and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def script(program: Program) -> str:
    """A script that runs the program and prints the difference."""
    return (
        "from tests.tools.fuzz.compare import check\n"
        "from tests.tools.fuzz.program import Program\n\n"
        f'SOURCE = r"""{program.source}"""\n'
        f"print(check(Program({program.seed}, SOURCE, {program.options!r}, {program.after})))\n"
    )
