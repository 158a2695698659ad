"""Every registered causal LM, tiny, plain and with LoRA: optimized, compared with eager, counted.

    python -m tests.models.coverage [--processes N] [--plain] [NAME ...]

writes ``docs/support.md`` (with names: only shows them).
"""

from __future__ import annotations

import argparse
import copy
import inspect
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fusewright

from . import architectures
from .candidates import Detector, covered

TOLERANCE = 1e-5
"""Relative, in fp32: a hundred units of rounding, for sums in another order."""


@dataclass
class Row:
    """What one architecture showed.

    Attributes:
        name: the registered name.
        lora: whether its linears are adapted.
        not_built: why there is no tiny model, or empty.
        problem: what went wrong with the optimized model, or empty.
        loss_error: relative difference of the loss from eager's.
        grad_error: relative difference of all gradients together from eager's.
        exact_errors: where that is more than ``TOLERANCE``: our own and eager's distance from fp64.
        rewritten: rule -> sites.
        candidates: kind -> (rewritten, all that the independent detector saw).
        left: (kind, module path, number) of the candidates that were not rewritten.
        gaps: (rule, status, reason) of every site that was refused or missed.
        passed: why regions were not captured.
        seconds: what it took.
    """

    name: str
    lora: bool
    not_built: str = ""
    problem: str = ""
    loss_error: float | None = None
    grad_error: float | None = None
    exact_errors: tuple[float, float] | None = None
    rewritten: dict[str, int] = field(default_factory=dict)
    candidates: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: list[tuple[str, str, int]] = field(default_factory=list)
    gaps: list[tuple[str, str, str]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def measure(name: str, lora: bool) -> Row:
    """Train one step of a tiny model in eager and optimized, and compare."""
    row, begun = Row(name, lora), time.perf_counter()
    torch._dynamo.reset()
    try:
        model = architectures.build(name)
    except architectures.CannotBuild as reason:
        row.not_built = str(reason)
        return row
    inputs = architectures.step_inputs(model) | _of_the_trainer(model)
    model = _adapted(model) if lora else model
    if lora and not _may_need_input_gradients(model, inputs):
        model = _adapted(architectures.build(name), input_gradients=False)
    eager, detector = copy.deepcopy(model), Detector()
    with detector.watching(eager):
        loss, grads = _step(eager, inputs)
    try:
        ours = fusewright.optimize(model, codegen="eager")
        our_loss, our_grads = _step(ours, inputs)
        report = fusewright.explain(ours)
    except Exception as error:  # the run goes on: this is a result, too
        row.problem = f"{type(error).__name__}: {error}"
        return row
    row.loss_error = float((our_loss - loss).abs() / loss.abs())
    if our_grads.keys() == grads.keys():
        row.grad_error = _difference(our_grads, grads)
        if row.grad_error > TOLERANCE:
            exact = _exact(eager, inputs)
            row.exact_errors = _difference(our_grads, exact), _difference(grads, exact)
    else:
        row.problem = f"other parameters have gradients: {sorted(our_grads.keys() ^ grads.keys())}"
    row.rewritten = report.by_rule()
    sites: Counter[tuple[str, str]] = Counter()
    for s in report.sites:
        if s.status == "rewritten":
            sites[s.rule, s.module] += s.formulas
    row.candidates, row.left = covered(detector.found, sites)
    row.gaps = [(s.rule, s.status, s.reason) for s in report.gaps()]
    row.passed = sorted({b.reason for b in report.bypasses if not b.reason.startswith("attention")})
    row.seconds = time.perf_counter() - begun
    return row


def _of_the_trainer(model: nn.Module) -> dict[str, Any]:
    """What ``transformers.Trainer`` passes beside a batch to a model that takes any keyword.

    Such a model hands it down to its parts, where a rule may stumble over it.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if not getattr(model, "accepts_loss_kwargs", takes_any):
        return {}
    items = architectures.BATCH * (architectures.LENGTH - 1)
    return {"num_items_in_batch": torch.tensor(items)}


def _may_need_input_gradients(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether eager can do what PEFT does under checkpointing; some write into the embeddings."""
    try:
        copy.deepcopy(model)(**inputs)
    except RuntimeError:
        return False
    return True


def _adapted(model: nn.Module, input_gradients: bool = True) -> Any:
    targets = architectures.targets(model) or "all-linear"
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and its A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    if input_gradients:
        model.enable_input_require_grads()
    return model


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _exact(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients in fp64."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # torch's grouped matmul takes no fp64
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    return _step(model, wide)[1]


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    flat = [torch.cat([g[n].flatten().double() for n in theirs]) for g in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def _measure_alone(case: tuple[str, bool]) -> Row:
    torch.set_num_threads(1)  # models this small only lose time to threads that wait
    name, lora = case
    row = measure(name, lora)
    adapter = "LoRA" if row.lora else "plain"
    print(f"{name} {adapter} {row.seconds:.0f} s {row.problem or row.not_built}", flush=True)
    return row


def main() -> None:
    """Measure all, and write the page."""
    from .support import SUPPORT, page  # which reads the rows of this file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--plain", action="store_true", help="leave LoRA out: half the time")
    parser.add_argument("names", nargs="*", help="show these only, and write nothing")
    options = parser.parse_args()
    adapters = (False,) if options.plain else (False, True)
    cases = [(n, lora) for n in options.names or architectures.names() for lora in adapters]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=40) as pool:
        rows = list(pool.imap_unordered(_measure_alone, cases))
    if options.names:
        print(page(rows))
    else:
        SUPPORT.write_text(page(rows))


if __name__ == "__main__":
    main()
