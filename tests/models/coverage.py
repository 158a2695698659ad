"""Every registered model for language, tiny: optimized, compared with eager, counted.

    python -m tests.models.coverage [--kind KIND ...] [--processes N] [--plain] [NAME ...]

measures the cases that ``--rows`` does not hold yet, adds a line of JSON for each, and writes
``docs/support*.md`` (with names: only shows them). A long sweep may be cut: ``--part 1/8`` measures
every eighth case and writes no page; the last run, without it, finds all rows there.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

import fusewright

from . import architectures, media
from .candidates import Detector, covered

TOLERANCE = 1e-5
"""Relative, in fp32: a hundred units of rounding, for sums in another order."""


CALLS = ("default", "Trainer", "LoRA")
"""How a step is called: as a user's loop does, with the batch alone; as ``transformers.Trainer``
does, who sets the outermost ``config.use_cache`` and passes ``num_items_in_batch``; and as a loop
does again, with LoRA on all linear layers of the decoder blocks and of the towers."""


class Case(NamedTuple):
    """What is measured: a registered name, what it is built as, and how it is called."""

    name: str
    kind: str = "causal"
    call: str = "Trainer"

    @property
    def lora(self) -> bool:
        """Whether its linears are adapted."""
        return self.call.endswith("LoRA")


def cases(kind: str) -> list[Case]:
    """All cases of a kind; causal language models are called as the Trainer does, twice."""
    if kind == "causal":
        calls: tuple[str, ...] = ("Trainer", "Trainer and LoRA")
    else:
        calls = CALLS if kind == "multimodal" else ("default", "LoRA")
    return [Case(name, kind, call) for call in calls for name in architectures.names(kind)]


@dataclass
class Row:
    """What one architecture showed.

    Attributes:
        case: what was measured.
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
        towers: of ``candidates``, what lies outside the language model: in encoders of other media
            and in what leads from them to it.
        first_call: the seconds that a processor takes for the first optimized step.
        seconds: what it took.
    """

    case: Case
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
    towers: dict[str, tuple[int, int]] = field(default_factory=dict)
    first_call: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The registered name."""
        return self.case.name

    @property
    def lora(self) -> bool:
        """Whether its linears are adapted."""
        return self.case.lora

    @property
    def language(self) -> dict[str, tuple[int, int]]:
        """Of ``candidates``, what ``towers`` does not hold."""
        language = {}
        for kind, (done, there) in self.candidates.items():
            done_outside, outside = self.towers.get(kind, (0, 0))
            language[kind] = (done - done_outside, there - outside)
        return language

    @classmethod
    def read(cls, line: str) -> Row:
        """The row that ``line`` of JSON holds."""
        values = json.loads(line)
        for name in ("candidates", "towers"):
            values[name] = {kind: tuple(counts) for kind, counts in values[name].items()}
        for name in ("left", "gaps"):
            values[name] = [tuple(entry) for entry in values[name]]
        errors = values["exact_errors"]
        values["exact_errors"] = errors and tuple(errors)
        return cls(Case(*values.pop("case")), **values)


def measure(case: Case) -> Row:
    """Train one step of a tiny model in eager and optimized, and compare."""
    row, begun = Row(case), time.perf_counter()
    torch._dynamo.reset()
    try:
        model = architectures.build(case.name, case.kind)
    except architectures.CannotBuild as reason:
        row.not_built = str(reason)
        return row
    inputs = architectures.step_inputs(model, case.kind)
    if case.call.startswith("Trainer"):
        inputs |= _of_the_trainer(model, inputs)
        model.config.use_cache = False
    towers = towers_of(model) if case.kind == "multimodal" else None
    if case.lora:
        causal = case.kind == "causal"  # as PEFT does under checkpointing
        try:
            model = _adapted(model, case.kind, input_gradients=causal)
        # a model that does not name its embeddings, or has no linears
        except (NotImplementedError, ValueError) as error:
            row.not_built = f"PEFT: {error}"
            return row
        if causal and not _may_need_input_gradients(model, inputs):
            model = _adapted(architectures.build(case.name), case.kind, input_gradients=False)
        towers = towers and [f"base_model.model.{path}" for path in towers]
    eager, detector = copy.deepcopy(model), Detector()
    try:
        with detector.watching(eager):
            loss, grads = _step(eager, inputs)
    except Exception as error:
        row.not_built = f"eager: {type(error).__name__}: {' '.join(str(error).split())}"
        return row
    try:
        ours = fusewright.optimize(model, codegen="eager")
        started = time.process_time()  # on one thread, the time on a machine that does no more
        our_loss, our_grads = _step(ours, inputs)
        row.first_call = time.process_time() - started
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
    if towers is not None:
        row.towers = _within(towers, detector.found, row.left)
    row.gaps = [(s.rule, s.status, s.reason) for s in report.gaps()]
    row.passed = sorted({b.reason for b in report.bypasses if not b.reason.startswith("attention")})
    row.seconds = time.perf_counter() - begun
    return row


def towers_of(model: nn.Module) -> list[str]:
    """The outermost modules that neither are, hold nor belong to the language model.

    Some language models hold an encoder: what runs by a configuration of another type.
    """
    parts = media.language_parts(model)
    paths = [path for path, module in model.named_modules() if any(module is p for p in parts)]
    kinds = {type(part.config) for part in parts if hasattr(part, "config")}
    towers: list[str] = []
    for path, module in model.named_modules():
        outside = not any(_inside(path, part) or _inside(part, path) for part in paths)
        within = path.rpartition(".")[0] in paths and any(
            isinstance(config := getattr(inner, "config", None), PreTrainedConfig)
            and type(config) not in kinds
            for inner in module.modules()
        )
        if (outside or within) and not any(_inside(path, tower) for tower in towers):
            towers.append(path)
    return towers


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


def _within(
    towers: list[str], found: dict[tuple[str, str], int], left: list[tuple[str, str, int]]
) -> dict[str, tuple[int, int]]:
    there: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for (kind, path), number in found.items():
        there[kind] += number * any(_inside(path, tower) for tower in towers)
    for kind, path, number in left:
        missed[kind] += number * any(_inside(path, tower) for tower in towers)
    return {kind: (n - missed[kind], n) for kind, n in there.items() if n}


def _of_the_trainer(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What ``transformers.Trainer`` passes beside a batch to a model that takes any keyword.

    Such a model hands it down to its parts, where a rule may stumble over it.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if not getattr(model, "accepts_loss_kwargs", takes_any):
        return {}
    items = int((inputs["labels"][:, 1:] != -100).sum()) if "labels" in inputs else 1
    return {"num_items_in_batch": torch.tensor(items)}


def _may_need_input_gradients(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether eager can do what PEFT does under checkpointing; some write into the embeddings."""
    try:
        copy.deepcopy(model)(**inputs)
    except RuntimeError:
        return False
    return True


def _adapted(model: nn.Module, kind: str, input_gradients: bool) -> Any:
    if kind == "causal":
        targets = architectures.targets(model) or "all-linear"
    else:
        targets = architectures.linears(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and its A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    if input_gradients:
        model.enable_input_require_grads()
    return model


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = architectures.loss_of(model, inputs)
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


def _measure_alone(case: Case) -> Row:
    torch.set_num_threads(1)  # models this small only lose time to threads that wait
    begun = time.perf_counter()
    row = measure(case)
    said = (row.problem or row.not_built)[:200]
    print(*case, f"{time.perf_counter() - begun:.0f} s", said, flush=True)
    return row


def measured(path: Path, wanted: Sequence[Case], processes: int) -> list[Row]:
    """The rows of all ``wanted`` cases: those in ``path``, and those that are added to it."""
    lines = path.read_text().splitlines() if path.exists() else ()
    rows = {row.case: row for row in map(Row.read, lines)}
    missing = [case for case in wanted if case not in rows or rows[case].not_built]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=40) as pool, path.open("a") as file:
        for row in pool.imap_unordered(_measure_alone, missing):
            rows[row.case] = row
            print(json.dumps(asdict(row)), file=file, flush=True)
    return [rows[case] for case in wanted]


def main() -> None:
    """Measure all, and write the pages."""
    from .support import pages  # which reads the rows of this file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", default=list(architectures.KINDS), dest="kinds")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--plain", action="store_true", help="leave LoRA out: half the time")
    parser.add_argument("--rows", type=Path, default=Path("support-rows.jsonl"))
    parser.add_argument("--part", default="1/1", help="2/8: the second eighth of the cases")
    parser.add_argument("names", nargs="*", help="show these only, and write nothing")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    wanted = [
        case
        for kind in options.kinds
        for case in cases(kind)
        if not (options.plain and case.lora) and (not options.names or case.name in options.names)
    ]
    rows = measured(options.rows, wanted[part - 1 :: parts], options.processes)
    for path, text in pages(rows).items():
        if options.names:
            print(text)
        elif parts == 1:
            path.write_text(text)


if __name__ == "__main__":
    main()
