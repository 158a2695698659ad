"""The pages ``docs/support*.md``: written from the coverage run's rows, read by its test."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from fusewright.passes import PIPELINE

from . import architectures
from .candidates import KINDS
from .coverage import TOLERANCE, Row

DOCS = Path(__file__).parents[2] / "docs"
SUPPORT = DOCS / "support.md"
PAGES = {
    kind: SUPPORT if kind == "causal" else DOCS / f"support-{kind}.md"
    for kind in architectures.KINDS
}
"""The page of each kind of model."""
RULES = tuple(dict.fromkeys(rule.name for rule in PIPELINE if rule.name != "attention"))
"""The columns of rules; attention is left to PyTorch in fp32."""
TITLES = {
    "norm": "norms", "rope": "rotary", "glu": "gated MLPs", "lora": "LoRA linears",
    "loss": "losses",
}  # fmt: skip

Counts = dict[str, tuple[int, int]]


class Column(NamedTuple):
    """A column of a page: formulas rewritten and there, in a call.

    Attributes:
        call: the call of the row that is read.
        part: the formulas of this row that are looked at.
        kinds: those of them that are counted.
    """

    call: str
    part: Callable[[Row], Counts]
    kinds: tuple[str, ...] = tuple(KINDS)

    def count(self, row: Row) -> tuple[int, int]:
        """(rewritten, there) in ``row``."""
        counts = [c for kind, c in self.part(row).items() if kind in self.kinds]
        return sum(done for done, _ in counts), sum(there for _, there in counts)


def _all(row: Row) -> Counts:
    return row.candidates


def _language(row: Row) -> Counts:
    return row.language


def _in_towers(row: Row) -> Counts:
    return row.towers


_BY_FORMULA = {
    **{TITLES[kind]: Column("default", _all, (kind,)) for kind in ("norm", "rope", "glu", "loss")},
    "LoRA linears": Column("LoRA", _all, ("lora",)),
    "all with LoRA": Column("LoRA", _all),
}
COLUMNS: dict[str, dict[str, Column]] = {
    "multimodal": {
        "language": Column("default", _language),
        "under Trainer": Column("Trainer", _language),
        "language with LoRA": Column("LoRA", _language),
        "towers": Column("default", _in_towers),
        "towers with LoRA": Column("LoRA", _in_towers),
        "losses": Column("default", _all, ("loss",)),
    },
    **dict.fromkeys(("classification", "embedding", "encoder-decoder"), _BY_FORMULA),
}
"""Kind of model -> title -> column, on the pages that have a line for each name."""
SUBJECTS = {
    "multimodal": "Every model of several media that transformers registers as writing text "
    "(`MODEL_FOR_MULTIMODAL_LM_MAPPING` and `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING`)",
    "classification": "Every classifier of texts that transformers registers "
    "(`MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING`)",
    "embedding": "Every base model of texts that transformers registers, trained as an embedding "
    "model: without labels, on the means of its last hidden states",
    "encoder-decoder": "Every encoder-decoder that transformers registers "
    "(`MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING`) and that is not multimodal",
}


def pages(rows: Iterable[Row]) -> dict[Path, str]:
    """The text of every page whose rows are there."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.case.kind, []).append(row)
    return {
        PAGES[kind]: page(some) if kind == "causal" else page_by_name(kind, some)
        for kind, some in by_kind.items()
    }


def page_by_name(kind: str, rows: Iterable[Row]) -> str:
    """The text of a page with a line for each name of a kind, over all calls."""
    names: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda r: r.name):
        names.setdefault(row.name, {})[row.case.call] = row
    built = {
        name: {call: row for call, row in by_call.items() if not row.not_built}
        for name, by_call in names.items()
        if not by_call["default"].not_built
    }
    every = [row for by_call in built.values() for row in by_call.values()]
    columns = COLUMNS[kind]
    lines = _introduction_by_name(kind, len(names), built, every)
    lines += ["| formulas | rewritten | there | share |", "|---|---|---|---|"]
    for title, column in columns.items():
        done, there = _sum(column, built.values())
        if there:
            lines.append(f"| {title} | {done} | {there} | {done / there:.1%} |")
    lines += ["", "## Model by model", ""]
    lines.append(f"| model | {' | '.join(columns)} | difference | first call | left |")
    lines.append(f"|---|{'---|' * (len(columns) + 3)}")
    lines += [_line_by_name(name, by_call, columns) for name, by_call in built.items()]
    for title, in_part in (("Not built", False), ("Not built with LoRA", True)):
        whys = {
            name: next((row.not_built for row in by_call.values() if row.not_built), "")
            for name, by_call in names.items()
            if (name in built) == in_part
        }
        missing = [f"- `{name}`: {_short(why)}" for name, why in whys.items() if why]
        lines += ["", f"## {title}", "", *missing] if missing else []
    return "\n".join(lines) + "\n"


def _sum(column: Column, built: Iterable[dict[str, Row]]) -> tuple[int, int]:
    counts = [column.count(by_call[column.call]) for by_call in built if column.call in by_call]
    return sum(done for done, _ in counts), sum(there for _, there in counts)


def _introduction_by_name(
    kind: str, number: int, built: dict[str, dict[str, Row]], rows: Sequence[Row]
) -> list[str]:
    far = [r for r in rows if r.grad_error is not None and r.grad_error > TOLERANCE]
    times = [row.first_call for row in rows if row.first_call] or [0.0]
    calls = {
        "multimodal": "with a batch of text and of the images, sounds or proteins that it reads; "
        "*language* is the decoder with its output head (and a text encoder), *towers* all other "
        "modules. A default call is one with the batch alone; `transformers.Trainer` sets "
        "`use_cache` in the outermost configuration only, and passes `num_items_in_batch`; with "
        "LoRA, all linear layers of both are adapted, in a default call.",
    }.get(kind, "in a default call, with the batch alone; once plain, once with LoRA on all its "
          "linear layers.")  # fmt: skip
    far_ones = (
        f"; {len(far)} are further than {TOLERANCE:.0e}, where eager's own distance from fp64 is "
        "as large"
    )
    paragraphs = (
        f"{SUBJECTS[kind]}, as a tiny model with random weights: one training step of eager and "
        f"one of the optimized model, in fp32 on a CPU, {calls} Written by "
        f"`python -m tests.models.coverage --kind {kind}`; a test fails when a number falls. What "
        "there is to rewrite is counted as on the [page of causal language models](support.md).",
        f"torch {torch.__version__}, transformers {transformers.__version__}: {len(built)} of "
        f"{number} names built, {len(rows)} steps compared, {sum(not r.problem for r in rows)} "
        "ran. The largest relative difference from eager is "
        f"{_worst(r.loss_error for r in rows)} in a loss and "
        f"{_worst(r.grad_error for r in rows)} in all gradients together{far_ones if far else ''}. "
        f"The first optimized step took {statistics.median(times):.1f} s of a processor (median), "
        f"{max(times):.1f} s at most.",
    )
    lines = [f"# Architectures: {kind}", ""]
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(paragraph, 96, break_long_words=False, break_on_hyphens=False), ""]
    return lines


def _line_by_name(name: str, by_call: dict[str, Row], columns: dict[str, Column]) -> str:
    cells = []
    for column in columns.values():
        row = by_call.get(column.call)
        done, there = (0, 0) if row is None else column.count(row)
        cells.append(f"{done}/{there}" if there else "")
    rows = by_call.values()
    worst = max((r.grad_error for r in rows if r.grad_error is not None), default=0.0)
    first = max(r.first_call for r in rows)
    left = "; ".join(dict.fromkeys(text for row in rows for text in _left_by_name(row)))
    return f"| `{name}` | {' | '.join(cells)} | {worst:.0e} | {first:.0f} s | {left} |"


def _left_by_name(row: Row) -> list[str]:
    """What is left and why: of an adapted model, what the plain one does not say already."""
    places: Counter[str] = Counter()
    for kind, path, number in row.left:
        block = re.sub(r"(^.*[.][0-9]+)[.].*$", r"\1", path.removeprefix("base_model.model."))
        places[f"{TITLES[kind]} in {_layer(block)}"] += number
    reasons = [_short(f"{rule} {status}: {reason}") for rule, status, reason in row.gaps]
    reasons += [_short(r.removeprefix("a block that is made alike ")) for r in row.passed]
    problem = [f"**{_short(row.problem)}**"] if row.problem else []
    return [*problem, *(f"{p} ({n}x)" for p, n in places.items()), *dict.fromkeys(reasons)]


def read_by_name(text: str) -> dict[str, Counts]:
    """(rewritten, there) by column, for each name of the text of a page by name."""
    header = next(line for line in text.splitlines() if line.startswith("| model |"))
    titles = header.split(" | ")[1:-3]
    found: dict[str, Counts] = {}
    for match in re.finditer(r"^\| `([\w.-]+)` \| (.*) \|$", text, re.MULTILINE):
        found[match[1]] = {}
        for title, cell in zip(titles, match[2].split(" | "), strict=False):
            done, _, there = cell.strip().partition("/")
            found[match[1]][title] = (int(done or 0), int(there or 0))
    return found


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
        "Made alike: [multimodal models](support-multimodal.md), "
        "[classifiers](support-classification.md),",
        "[embedding models](support-embedding.md), [encoder-decoders](support-encoder-decoder.md).",
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


def totals(rows: Iterable[Row]) -> Counts:
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
