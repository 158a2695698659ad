"""What ``verify`` prints and writes: a row for each way, and a sentence for each that failed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from ...rewrite.tolerance import FACTOR
from ..report.environment import machine, versions
from ..report.format import finite, memory
from .compare import LEFT_OUT, Allowed, Deviations
from .run_ways import Run
from .ways import Selection

VERDICTS = {"passed": "passed", "failed": "FAILED", "skipped": "skipped"}


@dataclass
class Row:
    """One way, compared.

    Attributes:
        run: how it went.
        found: how far it is from the reference; None: of the reference, or it was not trained.
        verdict: ``"reference"``, ``"limit"`` (eager mode, which sets it), ``"passed"``,
            ``"failed"`` or ``"skipped"``.
        exceeded: what differs, a clause each; or why it failed to run.
    """

    run: Run
    found: Deviations | None
    verdict: str
    exceeded: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """All ways of one recipe.

    Attributes:
        recipe: its name.
        chosen: the samples of the steps.
        rows: by way, the reference first.
        limits: how far a way may be from the reference.
    """

    recipe: str
    chosen: Selection
    rows: list[Row]
    limits: Allowed

    @property
    def failed(self) -> list[Row]:
        """The ways that differ, or did not run to their end."""
        return [row for row in self.rows if row.verdict == "failed"]

    def rate(self, run: Run) -> float:
        """Tokens per second, from the second step on; padding is not counted."""
        seconds = run.figures.get("seconds", [])[1:]
        tokens = sum(self.chosen.tokens_of(step) for step in range(1, 1 + len(seconds)))
        return tokens / sum(seconds) if sum(seconds) else math.nan

    def table(self) -> Table:
        """The table, for a terminal."""
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("way", "batches"):
            made.add_column(name, no_wrap=True)
        for name in (
            "loss", "loss off", "gradients off", "change off", "tokens/s", "peak memory"
        ):  # fmt: skip
            made.add_column(name, justify="right", no_wrap=True)
        made.add_column("", no_wrap=True)
        for row in self.rows:
            if row.run.status == "trained":
                made.add_row(*map(Text, self._cells(row)))
            else:
                layout = row.run.way.layout
                cells = [row.run.way.name, layout.text() if layout else "-", *["-"] * 6]
                made.add_row(*map(Text, [*cells, VERDICTS[row.verdict]]))
            if row.verdict == "limit":
                of = self.limits
                offs = [f"{d:.1e}" for d in (of.loss, of.gradient, of.change)]
                made.add_row(*map(Text, ["  allowed", "", "", *offs, "", "", ""]))
        return made

    def _cells(self, row: Row) -> list[str]:
        run, found = row.run, row.found
        assert run.way.layout is not None
        losses = run.figures["losses"]
        offs = ["-"] * 3
        if found is not None:
            offs = [f"{d:.1e}" for d in (found.loss, found.gradient, found.change)]
        name = run.way.name
        verdict = VERDICTS.get(row.verdict, "")
        if row.verdict == "reference":
            verdict = f"the reference, in {run.figures['dtype']}"
        return [
            name, run.way.layout.text(), f"{losses[0]:.4f} → {losses[-1]:.4f}", *offs,
            f"{self.rate(run):,.0f}", _peaks(run), verdict,
        ]  # fmt: skip

    def sentences(self) -> Iterator[str]:
        """What is below the table."""
        masks = sorted({mask for row in self.rows for mask in row.run.figures.get("masks", ())})
        yield (
            f"off: relative to the reference; gradients are those of the first step, and the "
            f"change is that of the weights in all steps, without the {LEFT_OUT:.0%} that are "
            f"furthest off. Allowed is {FACTOR} times what eager mode is off, and one unit of "
            f"rounding."
        )
        yield (
            "Random masks differ between layouts, so lora_dropout, neftune_noise_alpha and the "
            "model's own dropout are 0 in all ways"
            + (f" (this recipe or model has {', '.join(masks)})" if masks else "")
            + "; adapters that begin as zeros begin with small random values."
        )
        for row in self.rows:
            if row.verdict == "skipped":
                yield f"{row.run.way.name}: skipped: {row.run.reason}"
        for row in self.failed:
            yield f"{row.run.way.name}: FAILED: {'; '.join(row.exceeded)}. {self._advice(row)}"

    def _advice(self, row: Row) -> str:
        name = row.run.way.name
        if row.run.status != "trained":
            return "It did not run to its end; --keep keeps all that it printed (*.err)"
        broken = {other.run.way.name for other in self.failed}
        if name == "optimized":
            rules = row.run.figures.get("rewritten", {})
            shown = ", ".join(rules) or "none"
            return (
                "An optimized model must train as the original: find the rule with "
                f"FUSEWRIGHT_DISABLE=RULE (rewritten here: {shown}; FUSEWRIGHT_FUEL=N bisects), "
                "see fusewright explain, report it, and train with optimize: false until then"
            )
        if "optimized" in broken:
            return "The optimized model differs with the recipe's own batches, too: see there"
        if not row.run.figures.get("weighs_tokens", True):
            return (
                "The forward of this model takes no num_items_in_batch, so the losses of the "
                "batches of a step are averaged, however many tokens they train: use "
                "gradient_accumulation_steps: 1"
            )
        if name in ("packed", "unpacked"):
            return (
                "The same samples train differently when they share a sequence: set "
                "sample_packing: false, and report it"
            )
        if "processes" in name:
            return (
                "Several processes do not train what one does: train with --nproc 1, and report it"
            )
        return (
            "Batches of another size train differently: keep gradient_accumulation_steps: 1, and "
            "report it"
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, for ``--json``; NaN and infinity are text."""
        content = {
            "recipe": self.recipe,
            "passed": not self.failed,
            "steps": len(self.chosen.steps),
            "tokens": self.chosen.tokens,
            "trained_tokens": self.chosen.trained,
            "factor": FACTOR,
            "limits": dataclasses.asdict(self.limits),
            "ways": [self._way(row) for row in self.rows],
            "versions": versions(),
            "machine": machine(),
        }
        found: dict[str, Any] = finite(content)
        return found

    def _way(self, row: Row) -> dict[str, Any]:
        run, layout = row.run, row.run.way.layout
        figures = {k: v for k, v in run.figures.items() if k not in ("status", "reason")}
        return {
            "name": run.way.name,
            "verdict": row.verdict,
            "reason": run.reason,
            "exceeded": row.exceeded,
            "optimize": run.way.optimize,
            "rows": layout.rows if layout else None,
            "passes": layout.passes if layout else None,
            "processes": layout.processes if layout else None,
            "packing": layout.packing if layout else None,
            "deviations": dataclasses.asdict(row.found) if row.found else None,
            "tokens_per_s": self.rate(run),
            "run_seconds": run.seconds,
            **figures,
        }


def _peaks(run: Run) -> str:
    """The peak memory of each process: of its GPU where it has one."""
    each: Sequence[dict[str, float]] = run.figures.get("memory", ())
    return " + ".join(memory(peaks.get("cuda_mb", peaks["rss_mb"])) for peaks in each)
