"""Every registered causal LM, tiny, plain and with LoRA: optimized, compared with eager, counted.

    python -m tests.models.coverage [--processes N] [--plain]

writes ``docs/support.md``.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fusewright
from fusewright.passes import PIPELINE

from . import architectures

SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"
RULES = tuple(dict.fromkeys(rule.name for rule in PIPELINE if rule.name != "attention"))
"""The columns; attention is left to PyTorch in fp32."""


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
        rewritten: rule -> sites.
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
    rewritten: dict[str, int] = field(default_factory=dict)
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
    inputs = architectures.step_inputs(model)
    model = _adapted(model) if lora else model
    loss, grads = _step(copy.deepcopy(model), inputs)
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
    else:
        row.problem = f"other parameters have gradients: {sorted(our_grads.keys() ^ grads.keys())}"
    row.rewritten = {r: n for r, n in report.by_rule().items() if r in RULES}
    row.gaps = [(s.rule, s.status, s.reason) for s in report.gaps()]
    row.passed = sorted({b.reason for b in report.bypasses if not b.reason.startswith("attention")})
    row.seconds = time.perf_counter() - begun
    return row


def _adapted(model: nn.Module) -> Any:
    targets = architectures.targets(model) or "all-linear"
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and its A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()
    return model


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    flat = [torch.cat([g[n].flatten().double() for n in theirs]) for g in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def support(rows: Iterable[Row]) -> str:
    """The text of ``docs/support.md``."""
    rows = sorted(rows, key=lambda r: (r.name, r.lora))
    built = [r for r in rows if not r.not_built]
    equal = [r for r in built if not r.problem]
    lines = [
        "# Architectures",
        "",
        "Every causal language model that transformers registers, as a tiny model with random",
        f"weights, {_adapters(rows)}: one training step of eager and one of the",
        "optimized model, in fp32 on a CPU. Written by `python -m tests.models.coverage`; a test",
        "fails when a number falls.",
        "",
        f"transformers {transformers.__version__}: {len({r.name for r in built})} of "
        f"{len({r.name for r in rows})} names built, {len(built)} models; {len(equal)} ran.",
        f"The largest relative difference from eager is {_worst(r.loss_error for r in built)} in a",
        f"loss and {_worst(r.grad_error for r in built)} in all gradients together.",
        "",
        "A number is how many sites of a rule were rewritten; `2/3`: one of three was refused or",
        "missed. What counts as missed is what a rule's own detector suspects. A formula that was",
        "fused twice counts under both rules.",
        "",
        f"| architecture | adapter | {' | '.join(f'`{r}`' for r in RULES)} | gaps |",
        f"|---|---|{'---|' * (len(RULES) + 1)}",
    ]
    lines += [_line(row) for row in built]
    lines += ["", "## Not built", ""]
    lines += dict.fromkeys(f"- `{r.name}`: {r.not_built}" for r in rows if r.not_built)
    return "\n".join(lines) + "\n"


def _adapters(rows: Iterable[Row]) -> str:
    if any(row.lora for row in rows):
        return "plain and with LoRA on all its linears"
    return "without adapters (written with `--plain`)"


def _worst(values: Iterable[float | None]) -> str:
    return f"{max((v for v in values if v is not None), default=0.0):.0e}"


def _line(row: Row) -> str:
    lost = Counter(rule for rule, _, _ in row.gaps)
    cells = []
    for rule in RULES:
        done, missing = row.rewritten.get(rule, 0), lost[rule]
        cells.append(f"{done}/{done + missing}" if missing else str(done or ""))
    reasons = Counter(f"{rule} {status}: {_short(reason)}" for rule, status, reason in row.gaps)
    gaps = [f"{text} ({count}x)" if count > 1 else text for text, count in reasons.items()]
    gaps += [_short(reason) for reason in row.passed]
    if row.problem:
        gaps.insert(0, row.problem)
    adapter = "LoRA" if row.lora else "plain"
    return f"| `{row.name}` | {adapter} | {' | '.join(cells)} | {'; '.join(gaps)} |"


def _short(reason: str) -> str:
    text = reason.replace("|", "/").replace("\n", " ")
    return text if len(text) <= 110 else f"{text[:107]}..."


def read_support(text: str) -> dict[tuple[str, bool], dict[str, int]]:
    """The numbers of rewritten sites in the text of ``docs/support.md``."""
    found: dict[tuple[str, bool], dict[str, int]] = {}
    for match in re.finditer(r"^\| `(\w+)` \| (plain|LoRA) \| (.*) \|$", text, re.MULTILINE):
        cells = match[3].split(" | ")[: len(RULES)]
        counts = {r: int(c.split("/")[0]) for r, c in zip(RULES, cells, strict=True) if c.strip()}
        found[match[1], match[2] == "LoRA"] = counts
    return found


def _measure_alone(case: tuple[str, bool]) -> Row:
    torch.set_num_threads(1)  # models this small only lose time to threads that wait
    row = measure(*case)
    print(
        f"{row.name} {'LoRA' if row.lora else 'plain'} {row.problem or row.not_built}", flush=True
    )
    return row


def main() -> None:
    """Measure all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--plain", action="store_true", help="leave LoRA out: half the time")
    options = parser.parse_args()
    adapters = (False,) if options.plain else (False, True)
    cases = [(name, lora) for name in architectures.names() for lora in adapters]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=40) as pool:
        rows = list(pool.imap_unordered(_measure_alone, cases))
    SUPPORT.write_text(support(rows))


if __name__ == "__main__":
    main()
