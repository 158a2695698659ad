"""``optimize(strict=True)``: formulas that were not rewritten are errors."""

from __future__ import annotations

from ...errors import OptimizeError
from ..unit import Feature, Unit


class Strict(Feature):
    """Raise where a formula was refused or missed, if the caller has requested that."""

    name = "strict"

    def close(self, unit: Unit) -> None:
        """Raise ``OptimizeError`` with a line for each such formula."""
        if not unit.choices.options.strict:
            return
        gaps = [f for f in unit.notes.findings if f.status in ("refused", "missed")]
        if gaps:
            place = type(unit.call.module).__name__
            lines = {f"{'.'.join(filter(None, (place, f.home)))}: {f.rule} {f.status}: {f.reason}"
                     for f in gaps}  # fmt: skip
            raise OptimizeError(
                "strict=True, and these formulas keep their original code:\n  "
                + "\n  ".join(sorted(lines))
                + "\nPass strict=False to accept them; explain(model) lists them."
            )
