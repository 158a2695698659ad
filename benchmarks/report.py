"""From result files to what people read: tables of docs, README's figures, the chart, CSV files.

    python -m benchmarks report            # writes all of them
    python -m benchmarks report --check    # says whether they are what the result files give

A page has the tables between ``<!-- table: NAME -->`` and ``<!-- end -->``; nobody writes there.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import ROOT
from peers import PEERS

RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

NAMES = {
    "eager": "HF + PEFT", "hf": "HF + PEFT", "hf+gc": "HF + PEFT, checkpointing",
    "compile": "`torch.compile`", "compile-regional": "`torch.compile`, by block",
    "stock": "HF Trainer, padded", "stock+gc": "HF Trainer, padded, checkpointing",
    "stock-packed": "HF Trainer, without padding", "trl": "TRL SFT, packed",
    "trl-nogc": "TRL SFT, packed, no checkpointing", "fusewright": "fusewright",
    "fusewright:min": '`memory="min"`', "unsloth": "Unsloth", "llamafactory": "LLaMA-Factory",
    "swift": "ms-swift", "axolotl": "Axolotl",
}  # fmt: skip
"""What engines are called where people read."""

Rows = list[dict[str, Any]]


def results(name: str) -> Rows:
    """The rows of a result file, engines that failed left out."""
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return [row for row in (found if isinstance(found, list) else [found]) if not row.get("error")]


def one(name: str, engine: str) -> dict[str, Any]:
    """The row of an engine."""
    return next(row for row in results(name) if row["engine"] == engine)


def source(row: dict[str, Any]) -> str:
    """What a figure depends on, as a sentence."""
    versions = row["versions"]
    software = ", ".join(f"{n} {versions[n]}" for n in ("torch", "transformers", "peft", "trl")
                         if versions.get(n))  # fmt: skip
    count = row.get("threads")
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    place = row["card"] or f"{row['cpu']}{threads}"
    commit, _, changes = row["commit"].partition("+")
    changed = " with changes" if changes else ""
    when = f"{row['date'][:10]}, commit {commit[:8]}{changed}"
    return f"{place}; {software}; {when}.\n`{row['command']}`"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _times(value: float, base: float) -> str:
    return f"{value / base:.2f}x"


def step_table(name: str, memory: str = "peak_rss_mb") -> str:
    """Engines of ``train_step.py``: relative to the first one."""
    rows = results(name)
    heads = {"peak_rss_mb": "peak resident memory", "growth_mb": "growth of resident memory"}
    lines = [
        [
            NAMES[row["engine"]], f"{row['tokens_per_s']:.0f}",
            _times(row["tokens_per_s"], rows[0]["tokens_per_s"]), f"{row['first_step_s']:.1f} s",
            f"{row[memory]:,.0f} MiB", f"{row[memory] / rows[0][memory]:.0%}",
            f"{row['loss']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    titles = ("", "tokens/s", "", "first step", heads[memory], "", "last loss")
    return f"{markdown(titles, lines)}\n\n{source(rows[0])}"


def training_table(name: str) -> str:
    """Engines of ``training.py``: relative to the first one."""
    rows = results(name)
    lines = [
        [
            NAMES[row["engine"]], f"{row['trained_tokens_per_s']:.0f}",
            _times(row["trained_tokens_per_s"], rows[0]["trained_tokens_per_s"]),
            f"{sum(row['all_step_s']):.0f} s", f"{row['first_step_s']:.1f} s",
            f"{row['peak_rss_mb']:,.0f} MiB", f"{row['peak_rss_mb'] / rows[0]['peak_rss_mb']:.0%}",
            f"{row['validation_loss']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    titles = ("", "trained tokens/s", "", "all steps", "first step", "peak resident memory", "",
              "validation loss")  # fmt: skip
    about = [
        f"\n{NAMES[name]}: {PEERS[name].about} ({', '.join(versions)})."
        for name, versions in ((row["engine"], row.get("peer_versions")) for row in rows)
        if versions
    ]
    before = f"validation loss before training {rows[0]['base_validation_loss']:.4f}"
    said = f"{len(rows[0]['all_step_s'])} steps, {before}. {source(rows[0])}"
    return f"{markdown(titles, lines)}\n\n{said}" + "\n".join(["", *about] if about else [])


def preparation_table(name: str) -> str:
    """Engines of ``preparation.py``."""
    (found,) = results(name)
    lines = [
        [row["engine"], f"{row['prepare_s']:.1f} s", f"{row['cpu_s']:.1f} s"]
        for row in found["engines"]
    ]
    same = "Tokens and labels are the same. " if found["same"] else ""
    titles = ("", "by the clock", "processor time")
    return f"{markdown(titles, lines)}\n\n{same}{source(found)}"


def curves_table(name: str) -> str:
    """The points of ``curves.py``, an axis a line: our speed and growth, relative to eager's."""
    found = results(name)
    first = found[0]["engine"]
    lines: dict[str, list[str]] = {}
    for row in found:
        if row["engine"] == first:
            base = row
            continue
        share = f"{row['growth_mb'] / base['growth_mb']:.0%}"
        point = f"{row['value']:,}: **{row['ratio']:.2f}x** ({share})"
        lines.setdefault(row["axis"], []).append(point)
    table = [[axis, ", ".join(points)] for axis, points in lines.items()]
    return f"{markdown(('', 'speed (growth of memory)'), table)}\n\n{source(found[0])}"


def preferences_table(name: str) -> str:
    """Methods of ``preferences.py``: TRL's trainer on the plain model, and on ours."""
    found = results(name)
    lines = []
    for plain, ours in zip(found[::2], found[1::2], strict=True):
        shares = _times(plain["seconds"], ours["seconds"]), ours["growth_mb"] / plain["growth_mb"]
        each = [f"{row['seconds']:.1f} s, {row['growth_mb']:,.0f} MiB" for row in (plain, ours)]
        lines.append([plain["method"], *each, f"{shares[0]}, {shares[1]:.0%} of the memory"])
        if plain["generation"]:
            seconds = [row["generation"] for row in (plain, ours)]
            spent = [f"{s:.1f} s" for s in seconds]
            lines.append(["its completions alone", *spent, _times(seconds[0], seconds[1])])
    titles = ("", "TRL, plain", "TRL, optimized", "")
    return f"{markdown(titles, lines)}\n\n{source(found[0])}"


def first_step_table(name: str) -> str:
    """Starts of ``first_step.py``."""
    found = results(name)
    caches = {"empty": "empty", "filled": "filled by an earlier process"}
    lines = [
        [
            caches[row["cache"]], f"{row['first_step_s']:.1f} s", f"{row['cpu_s']:.1f} s",
            f"{row['compilers_cpu_s']:.1f} s", row["sites_verified"],
        ]
        for row in found
    ]  # fmt: skip
    titles = ("cache", "by the clock", "process", "its compilers", "rewrites verified")
    return f"{markdown(titles, lines)}\n\n{source(found[0])}"


def moe_table(name: str) -> str:
    """A model of ``moe.py``: milliseconds of its steps."""
    (found,) = results(name)
    spent = [found["median_ms"][engine] for engine in ("eager", "fusewright")]
    line = [f"{found['model']}, {found['method']}", *(f"{ms:,.0f} ms" for ms in spent)]
    titles = ("", "eager", "fusewright", "")
    return f"{markdown(titles, [[*line, _times(*spent)]])}\n\n{source(found)}"


def soak_table(machine: str = "") -> str:
    """Both runs of ``soak.py``; ``machine``: as in ``headline``."""
    rows = [results(f"soak-{method}{machine}-cpu")[0] for method in ("lora", "qlora")]
    lines = [
        [
            row["method"], f"{row['steps']:,}", f"{row['resident_mb']:.0f} MiB",
            f"{row['resident_last_mb']:.0f} MiB", f"{row['drift']:.2%}", str(row["graphs"]),
            str(row["last_new_graph"]), f"{row['slope']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    titles = ("", "steps", "resident after 100", "at the end", "drift", "graphs", "last at step",
              "time of a step, at the end")  # fmt: skip
    return f"{markdown(titles, lines)}\n\n{source(rows[0])}"


def readme_table() -> str:
    """README's figures, of those files that are there."""
    lines = []
    fp32 = {row["engine"]: row for row in results("train_step-smollm2-fp32-cpu")}
    bf16 = {row["engine"]: row for row in results("train_step-smollm2-bf16-cpu")}

    def rate(row: dict[str, Any]) -> str:
        return f"{row['tokens_per_s']:.0f}"

    lines.append(
        ["LoRA step, fp32, 4 × 256", f"HF + PEFT: {rate(fp32['eager'])} tokens/s, "
         f"`torch.compile`: {rate(fp32['compile'])}", rate(fp32["fusewright"])]
    )  # fmt: skip
    qlora = {row["engine"]: row for row in results("train_step-smollm2-qlora-bf16-8x512-cpu")}
    lines.append(
        ["QLoRA step, bf16, 8 × 512",
         f"HF + PEFT: {rate(qlora['hf'])} tokens/s, {qlora['hf']['growth_mb']:,.0f} MiB",
         f"{rate(qlora['fusewright'])}, {qlora['fusewright']['growth_mb']:,.0f} MiB"]
    )  # fmt: skip
    first = {engine: f"{row['first_step_s']:.1f} s" for engine, row in bf16.items()}
    lines.append(
        ["First step, bf16, 4 × 256", f"HF + PEFT: {first['eager']}, "
         f"`torch.compile`: {first['compile']}", first["fusewright"]]
    )  # fmt: skip
    runs = {row["engine"]: row for row in results("training-smollm2-bf16-cpu")}
    losses = {engine: f"{row['validation_loss']:.4f}" for engine, row in runs.items()}
    lines.append(
        ["Validation loss, whole run", f"HF Trainer: {losses['stock']}, TRL: {losses['trl']}",
         losses["fusewright"]]
    )  # fmt: skip
    (moe,) = results("moe-qwen3-moe-lora-bf16-cpu")
    lines.append(
        ["MoE step (Qwen3-MoE, 64 experts, 2 layers, bf16)", "HF + PEFT",
         f"{moe['ratio_of_medians']:.2f}x"]
    )  # fmt: skip
    (prepared,) = results("preparation-cpu")
    seconds = {row["engine"]: f"{row['prepare_s']:.1f} s" for row in prepared["engines"]}
    lines.append(["10,000 chats to tokens and masks", f"TRL: {seconds['trl']}",
                  seconds["fusewright"]])  # fmt: skip
    return markdown(("", "baseline", "fusewright"), lines)


def headline(machine: str = "") -> str:
    """README's first claim, like with like; ``machine``: a part of the names of its files."""
    measured = results(f"train_step-smollm2-bf16-8x512-memory{machine}-cpu")
    step = {row["engine"]: row for row in measured}
    runs = {row["engine"]: row for row in results(f"training-smollm2-bf16{machine}-cpu")}
    ours = step["fusewright"]
    speed = _times(ours["tokens_per_s"], step["hf"]["tokens_per_s"])
    memory = f"{ours['growth_mb'] / step['hf']['growth_mb']:.0%}"
    against = [
        f"**{_rate(runs['fusewright'], runs[engine])}** that of {what}"
        for engine, what in (
            ("stock", "the HF Trainer, which pads"),
            ("stock-packed", "the HF Trainer without padding"),
            ("trl-nogc", "TRL, packed, without checkpointing"),
            ("trl", "TRL, packed, with its default checkpointing"),
        )
        if engine in runs
    ]
    least = runs["fusewright:min"]
    padded, plain = runs["stock"], runs["stock-packed"]
    return (
        f"A training step at **{speed}** the speed of HF + PEFT with {memory} of its memory growth "
        f"(8 × 512). The speed of a whole run, packed: {', '.join(against)}. With `memory: min` a "
        f"run takes {_peak(least, padded)} of the peak memory of the HF Trainer, which pads, and "
        f"{_peak(least, plain)} of that without padding, at {_rate(least, padded)} and "
        f"{_rate(least, plain)} the speed."
    )


def _rate(row: dict[str, Any], base: dict[str, Any]) -> str:
    return _times(row["trained_tokens_per_s"], base["trained_tokens_per_s"])


def _peak(row: dict[str, Any], base: dict[str, Any]) -> str:
    return f"{row['peak_rss_mb'] / base['peak_rss_mb']:.0%}"


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "headline-amx": lambda: headline("-amx"),
    "readme": readme_table,
    "step-bf16": lambda: step_table("train_step-smollm2-bf16-cpu"),
    "step-fp32": lambda: step_table("train_step-smollm2-fp32-cpu"),
    "step-8x512": lambda: step_table("train_step-smollm2-bf16-8x512-memory-cpu", "growth_mb"),
    "qlora-8x512": lambda: step_table("train_step-smollm2-qlora-bf16-8x512-cpu", "growth_mb"),
    "qlora-4x256": lambda: step_table("train_step-smollm2-qlora-bf16-4x256-cpu", "growth_mb"),
    "training": lambda: training_table("training-smollm2-bf16-cpu"),
    "peers": lambda: training_table("training-peers-smollm2-bf16-cpu"),
    "soak": soak_table,
    "soak-amx": lambda: soak_table("-amx"),
    "moe-amx": lambda: moe_table("moe-qwen3-moe-lora-bf16-amx-cpu"),
    "preparation": lambda: preparation_table("preparation-cpu"),
    "step-bf16-amx": lambda: step_table("train_step-smollm2-bf16-amx-cpu"),
    "step-fp32-amx": lambda: step_table("train_step-smollm2-fp32-amx-cpu"),
    "step-8x512-amx": lambda: step_table(
        "train_step-smollm2-bf16-8x512-memory-amx-cpu", "growth_mb"
    ),
    "qlora-4x256-amx": lambda: step_table(
        "train_step-smollm2-qlora-bf16-4x256-amx-cpu", "growth_mb"
    ),
    "training-amx": lambda: training_table("training-smollm2-bf16-amx-cpu"),
    "preparation-amx": lambda: preparation_table("preparation-amx-cpu"),
    "curves": lambda: curves_table("curves-cpu"),
    "preferences": lambda: preferences_table("preferences-smollm2-bf16-cpu"),
    "first-step": lambda: first_step_table("first_step-smollm2-cpu"),
}

_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables.

    Raises:
        KeyError: it names a table that is none.
    """
    return _PLACE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[4]}", text)


def as_csv(name: str) -> str:
    """A result file as CSV: an engine a line, single figures only, versions in one column."""
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    rows = [_flat(row) for row in (found if isinstance(found, list) else [found])]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    versions = row.get("versions") or {}
    said = " ".join(f"{name}={version}" for name, version in versions.items() if version)
    single = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
    return single | {"versions": said}


def made() -> dict[Path, str]:
    """All that is made from the result files but the chart: path and content."""
    pages = {page: filled(page.read_text("utf-8")) for page in PAGES}
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return pages | {RESULTS / f"{name}.csv": as_csv(name) for name in names}


def main(check: bool) -> int:
    """Write what is made from the results; with ``check`` only say what differs, and return 1."""
    different = [
        path
        for path, text in made().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for path in different:
        print(f"{path.relative_to(ROOT)} {'differs from its results' if check else 'written'}")
    if check:
        return 1 if different else 0
    for path, text in made().items():
        path.write_text(text, "utf-8")
    from chart import draw

    draw(ROOT / "docs" / "speed_and_memory.svg")
    return 0
