"""``explain`` of a model that may not have been called yet: then it takes a small step first."""

from __future__ import annotations

from torch import nn

import fusewright
from fusewright import Report
from fusewright.compiler.pipeline import NOT_CALLED
from fusewright.compiler.tiny_step import tiny_step


def explain(model: nn.Module) -> Report:
    """The report, with two tiny steps before it if nothing was captured yet."""
    report = fusewright.explain(model)
    if any(b.reason == NOT_CALLED for b in report.bypasses):
        tiny_step(model)
        tiny_step(model)  # a head that calls the blocks itself is captured in the second one
        report = fusewright.explain(model)
    return report
