"""The page ``docs/support.md``: written from the coverage run's rows, read by its test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

from fusewright.passes import PIPELINE

from .candidates import KINDS
from .coverage import Row

SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"
RULES = tuple(dict.fromkeys(rule.name for rule in PIPELINE if rule.name != "attention"))
"""The columns of rules; attention is left to PyTorch in fp32."""
TITLES = {
    "norm": "norms", "rope": "rotary", "glu": "gated MLPs", "lora": "LoRA linears",
    "loss": "losses",
}  # fmt: skip


def page(rows: Iterable[Row]) -> str:
    """The text of ``docs/support.md``."""
    rows = sorted(rows, key=lambda r: (r.name, r.lora))
    built = [r for r in rows if not r.not_built]
    lines = [*_introduction(rows, built), *_totals(built)]
    heads = [*TITLES.values(), *(f"`{r}`" for r in RULES)]
    lines += [
        "## Architecture by architecture",
        "",
        f"| architecture | adapter | {' | '.join(heads)} | gaps |",
        f"|---|---|{'---|' * (len(heads) + 1)}",
    ]
    lines += [_line(row) for row in built]
    missing = dict.fromkeys(f"- `{r.name}`: {r.not_built}" for r in rows if r.not_built)
    lines += ["", "## Not built", "", *missing] if missing else []
    return "\n".join(lines) + "\n"


def _introduction(rows: Sequence[Row], built: Sequence[Row]) -> list[str]:
    equal = [r for r in built if not r.problem]
    return [
        "# Architectures",
        "",
        "Every causal language model that transformers registers, as a tiny model with random",
        f"weights, {_adapters(rows)}: one training step of eager and one of the",
        "optimized model, in fp32 on a CPU, called as `transformers.Trainer` calls it. Written by",
        "`python -m tests.models.coverage`; a test fails when a number falls.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}: "
        f"{len({r.name for r in built})} of {len({r.name for r in rows})} names built,",
        f"{len(built)} models; {len(equal)} ran. The largest relative difference from eager is",
        f"{_worst(r.loss_error for r in built)} in a loss and "
        f"{_worst(r.grad_error for r in built)} in all gradients together.",
        "",
        "The first columns say how many of the formulas there are were rewritten. What there is",
        "is not counted by the rules, which read captured graphs, but by a detector that watches",
        "one eager step of the plain model (`tests/models/candidates.py`): a *norm* is a module",
        "whose output stays when its input is scaled, and outside of such each call of `rsqrt`,",
        "`x ** -0.5`, `F.layer_norm`, `F.rms_norm` or `F.normalize`; a *rotary* embedding is a",
        "tensor that a function called `...rotary...`, `...rope...` or `...rotate...` gives back",
        "in its shape; a *gated MLP* is a product of two tensors of which one is an activation of",
        "another source than the other, in a module that neither attends nor convolves; a *LoRA",
        "linear* is a module with an adapter that was called; a *loss* is a call of",
        "`F.cross_entropy`. A place in the source of a module counts once.",
        "",
        "The other columns are the sites by rule; `2/3`: one of three was refused or missed, by",
        "the rule's own account. A formula that was fused twice counts under both rules.",
        "",
    ]


def _adapters(rows: Iterable[Row]) -> str:
    if any(row.lora for row in rows):
        return "plain and with LoRA on all its linears"
    return "without adapters (written with `--plain`)"


def _worst(values: Iterable[float | None]) -> str:
    return f"{max((v for v in values if v is not None), default=0.0):.0e}"


def totals(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """Kind -> (rewritten, all) over ``rows``."""
    sums = {kind: (0, 0) for kind in KINDS}
    for row in rows:
        for kind, (done, there) in row.candidates.items():
            sums[kind] = (sums[kind][0] + done, sums[kind][1] + there)
    return sums


def _totals(rows: Sequence[Row]) -> list[str]:
    lines = ["| formula | rewritten | there | share |", "|---|---|---|---|"]
    for kind, (done, there) in totals(rows).items():
        if there:
            lines.append(f"| {TITLES[kind]} | {done} | {there} | {done / there:.1%} |")
    return [*lines, ""]


def _line(row: Row) -> str:
    lost = Counter(rule for rule, _, _ in row.gaps)
    cells = []
    for kind in TITLES:
        done, there = row.candidates.get(kind, (0, 0))
        cells.append(f"{done}/{there}" if there else "")
    for rule in RULES:
        done, missing = row.rewritten.get(rule, 0), lost[rule]
        cells.append(f"{done}/{done + missing}" if missing else str(done or ""))
    adapter = "LoRA" if row.lora else "plain"
    return f"| `{row.name}` | {adapter} | {' | '.join(cells)} | {'; '.join(_gaps(row))} |"


def _gaps(row: Row) -> list[str]:
    reasons = Counter(f"{rule} {status}: {_short(reason)}" for rule, status, reason in row.gaps)
    gaps = [f"{text} ({count}x)" if count > 1 else text for text, count in reasons.items()]
    gaps += [_short(reason) for reason in row.passed]
    if row.left:
        places = Counter(f"{kind} in {_layer(path)}" for kind, path, _ in row.left)
        gaps.append("left: " + ", ".join(f"{place} ({n}x)" for place, n in places.items()))
    return [row.problem, *gaps] if row.problem else gaps


def _layer(path: str) -> str:
    return f"`{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', path) or 'the model'}`"


def _short(reason: str) -> str:
    text = reason.replace("|", "/").replace("\n", " ")
    return text if len(text) <= 110 else f"{text[:107]}..."


def read(text: str) -> dict[tuple[str, bool], dict[str, tuple[int, int]]]:
    """(rewritten, all) by column, for each row of the text of ``docs/support.md``."""
    found: dict[tuple[str, bool], dict[str, tuple[int, int]]] = {}
    header = next(line for line in text.splitlines() if line.startswith("| architecture"))
    names = [cell.strip("`") for cell in header.split(" | ")[2:-1]]  # a rule may be newer
    for match in re.finditer(r"^\| `([\w-]+)` \| (plain|LoRA) \| (.*) \|$", text, re.MULTILINE):
        cells = match[3].split(" | ")[: len(names)]
        counts = {}
        for name, cell in zip(names, cells, strict=True):
            if cell.strip():
                done, _, there = cell.partition("/")
                counts[name] = (int(done), int(there or done))
        found[match[1], match[2] == "LoRA"] = counts
    return found
