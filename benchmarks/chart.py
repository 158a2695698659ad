"""The chart of the README: speed and memory against other engines, drawn from result files.

    python benchmarks/chart.py docs/speed_and_memory.svg

Draws three comparisons, each from one file of ``benchmarks/results/``, so that all bars of a group
were measured in one run on one machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

GROUPS = (
    (
        "Training step, 8 × 512",
        "train_step-smollm2-bf16-8x512-memory-cpu.json",
        ("tokens_per_s", "growth_mb"),
        {
            "hf": "HF + PEFT",
            "hf+gc": "HF + PEFT, checkpointing",
            "fusewright": "fusewright",
            "fusewright:min": "fusewright, memory min",
        },
    ),
    (
        "Training step, 4 × 256",
        "train_step-smollm2-bf16-cpu.json",
        ("tokens_per_s", "peak_rss_mb"),
        {"eager": "HF + PEFT", "compile": "torch.compile", "fusewright": "fusewright"},
    ),
    (
        "Whole run",
        "training-smollm2-bf16-cpu.json",
        ("trained_tokens_per_s", "peak_rss_mb"),
        {
            "stock": "HF Trainer, padded",
            "trl": "TRL SFT, packed",
            "fusewright": "fusewright",
            "fusewright:min": "fusewright, memory min",
        },
    ),
)
"""Title, result file, its fields for speed and memory, and the engines with their labels."""

HEADINGS = {
    "tokens_per_s": "tokens/s",
    "trained_tokens_per_s": "trained tokens/s",
    "growth_mb": "memory growth in MB",
    "peak_rss_mb": "peak memory in MB",
}

OURS, THEIRS = "#1f6feb", "#9aa4b2"


def rows(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a result file by engine."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return {row["engine"]: row for row in found}


def draw(path: Path) -> None:
    """Write the chart as an SVG that is the same each time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fusewright", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(GROUPS),
        2,
        figsize=(9, 6),
        gridspec_kw={"height_ratios": [len(labels) for *_, labels in GROUPS]},
        layout="constrained",
    )
    for (title, name, fields, labels), pair in zip(GROUPS, axes, strict=True):
        found = rows(name)
        colours = [OURS if engine.startswith("fusewright") else THEIRS for engine in labels]
        for axis, field in zip(pair, fields, strict=True):
            values = [found[engine][field] for engine in labels]
            bars = axis.barh(list(labels.values()), values, color=colours)
            axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3)
            axis.set_xlim(0, max(values) * 1.15)
            axis.invert_yaxis()
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.set_xticks([])
            axis.set_title(HEADINGS[field], loc="left")
        pair[0].set_title(f"{title}: {HEADINGS[fields[0]]}", loc="left")
        pair[1].set_yticks([])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw to the path that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the SVG file to write")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
