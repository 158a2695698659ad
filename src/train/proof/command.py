"""``fusewright verify RECIPE``: the same steps in several ways, compared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ...errors import RecipeError
from ...kernels.tolerance import FACTOR
from ..consent import Consent
from ..data import prepare
from ..data.order import order_of
from ..model.from_pretrained import meta_model
from ..model.load import load_config, quiet
from ..model.precision import dtype_for_training
from ..model.processor import load_processing
from ..output_files import write_atomically
from ..preflight import model_obstacles
from ..processes.launch import rank_environment
from ..processes.signals import Interrupts
from ..processes.world import PARENT
from ..recipe.keys.base import Keys
from ..recipe.keys.output import OutputKeys
from ..recipe.keys.tracking import TrackingKeys
from ..recipe.preferences import method_of
from ..recipe.recipe import Recipe
from ..report.environment import machine, versions
from ..report.format import duration, finite, memory
from ..report.throughput import flops_per_token, peak_flops
from ..terminal import Terminal, say
from ..trainer.batches import training_sequences
from .compare import (
    LEFT_OUT,
    Allowed,
    Deviations,
    deviations,
    drift_of,
    exceeded,
    may_be_luck,
    over_draws,
)
from .merged import Merged
from .ways import (
    Selection,
    Way,
    draws_of,
    in_draws,
    second_eager,
    select,
    sequences_per_step,
    unpacked,
    ways_of,
)
from .worker import RESULT, SAMPLES, Job, write_samples

_START_SECONDS = 20.0
"""Approximate time from a process's start to its first step: imports, loading a small model."""
_SHARE_OF_PEAK = 0.3
"""Approximate share of a device's speed in large products that a step of eager mode reaches."""


@dataclass(frozen=True)
class VerifyOptions:
    """The options of the command.

    Attributes:
        name: of the recipe, for the messages.
        steps: how many each way trains.
        processes: how many share the steps in the last way.
        json: a file for all figures; None: none is written.
        keep: keep the scratch folder.
    """

    name: str
    steps: int = 5
    processes: int = 2
    json: Path | None = None
    keep: bool = False


def verify(recipe: Recipe, options: VerifyOptions) -> int:
    """Compare the ways of a checked recipe with absolute paths, and print the table.

    Nothing is written where the recipe says.

    Returns:
        The exit code: 0 if all ways passed that were run, else 1.

    Raises:
        RecipeError: the recipe cannot be trained, not even in eager mode.
        DataError: a dataset cannot be used.
        Stopped: a signal came; all processes have ended and the scratch folder is gone.
    """
    if obstacles := list(model_obstacles(alone(recipe))):
        raise RecipeError("\n  ".join(obstacles))
    method = "with a teacher (kd_trainer)" if recipe.kd_trainer else method_of(recipe)
    if method is not None:
        raise RecipeError(
            f"verify compares the losses of supervised training, and this recipe trains {method}: "
            "compare train with optimize: true and optimize: false"
        )
    console, progress = Terminal(), Terminal(stderr=True)

    def tell(text: str) -> None:
        say(progress, f"verify: {text}")

    with Interrupts(), quiet(), _scratch(options.keep, tell) as folder:
        chosen = _select(recipe, options.steps, tell)
        write_samples(folder / SAMPLES, chosen.samples)
        mixes = recipe.packs() and _mixes_samples(recipe)
        if mixes:
            tell(_ONE_BY_ONE)
        ways = ways_of(recipe, chosen, options.processes, _gpus(), mixes)
        for line in _announcement(recipe, ways, chosen):
            tell(line)
        runner = Runner(recipe, options.steps, folder, tell)
        rows, limits = _compared(_run(ways, chosen, runner), chosen)
        _judge_again(rows, limits, chosen, runner)
        comparison = Comparison(options.name, chosen, rows, limits)
    console.print()
    console.print(comparison.table())
    console.print()
    for line in comparison.sentences():
        say(console, line)
    failed = len(comparison.failed)
    if options.json is not None:
        write_atomically(options.json, json.dumps(comparison.to_dict(), indent=2) + "\n")
        tell(f"the figures are in {options.json}")
    say(console, f"\n{failed} of the ways failed" if failed else "\nall ways that were run passed")
    return int(failed > 0)


@contextlib.contextmanager
def _scratch(keep: bool, tell: Callable[[str], None]) -> Iterator[Path]:
    """A folder that only its owner can read, and that is removed in the end, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="fusewright-verify-"))
    try:
        yield folder
    finally:
        if keep:
            tell(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _gpus() -> int | None:
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def _mixes_samples(recipe: Recipe) -> bool:
    """Whether the samples of a pack see each other in a model that is not optimized."""
    from ...compiler.packs import unpackable

    return bool(unpackable(meta_model(recipe, load_config(recipe)), optimized=False))


def _select(recipe: Recipe, steps: int, tell: Callable[[str], None]) -> Selection:
    """The samples of the first steps, in the order in which the recipe trains them."""
    tell("preparing the rows")
    prepared = prepare(recipe, load_processing(recipe))
    sequences = training_sequences(prepared, recipe)
    size = sequences_per_step(recipe)
    in_order: Any = sequences
    if not recipe.streams():
        order = order_of(sequences, recipe, recipe.micro_batch_size)
        in_order = (sequences[i] for i in order)
    return select(islice(in_order, steps * size), steps, size)


# --- the announcement ----------------------------------------------------------------------------


def _announcement(recipe: Recipe, ways: Sequence[Way], chosen: Selection) -> Iterator[str]:
    names = [way.name for way in ways if way.layout is not None]
    steps, size = len(chosen.steps), len(chosen.steps[0])
    passes = recipe.accumulation()
    usual = recipe.micro_batch_size * passes
    instead = f" (the recipe's own has {usual})" if usual != size else ""
    yield (
        f"{len(names)} ways, one after the other, each in a process of its own: "
        f"{', '.join(names)}. Each trains {steps} steps of {size} sequences{instead}, "
        f"{chosen.tokens:,} tokens in all, at a constant learning rate. Nothing is written to "
        f"{recipe.output_dir}, to a tracker or to the hub"
    )
    for way in ways:
        if way.layout is None:
            yield f"{way.name} is skipped: {way.skipped}"
    seconds = _seconds(recipe, chosen)
    if seconds is None:
        yield "how long it takes is known after the first way"
    else:
        yield (
            f"this takes about {duration(seconds * len(names))}, as estimated from the model's "
            "size and the speed of this machine"
        )


def _seconds(recipe: Recipe, chosen: Selection) -> float | None:
    """Estimated duration of a way; None: unknown, as measuring on a GPU would take its memory."""
    if torch.cuda.is_available():
        return None
    try:
        config = load_config(recipe)
        per_token = flops_per_token(meta_model(recipe, config))
        dtype = dtype_for_training(recipe.precision(), recipe.adapter is not None)
        speed = peak_flops(torch.device("cpu"), dtype)
    except Exception:  # an estimate is not worth an error; what is wrong shows in the first way
        return None
    if speed is None:
        return None
    return _START_SECONDS + chosen.tokens * per_token / (_SHARE_OF_PEAK * speed)


# --- running and comparing -----------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """Runs ways of one recipe; ``folder`` is scratch, with the samples."""

    recipe: Recipe
    steps: int
    folder: Path
    tell: Callable[[str], None]

    def run(self, way: Way, number: str) -> Run:
        """Run one way, and report the result."""
        if way.layout is not None:
            self.tell(f"{number} {way.name}: {way.layout.text()}")
        run = run_way(self.recipe, way, self.steps, self.folder, self.recipe.consent, self.tell)
        if way.layout is not None:
            how = f": {run.reason}" if run.reason else f" in {duration(run.seconds)}"
            self.tell(f"{number} {way.name}: {run.status}{how}")
        return run


_ONE_BY_ONE = (
    "the plain model lets the samples of a pack see each other, in recurrent layers or "
    "convolutions: exact and eager train them one by one"
)


def _run(ways: Sequence[Way], chosen: Selection, runner: Runner) -> list[Run]:
    """Run all ways, the reference first; RecipeError if eager mode refuses the recipe."""
    exact, eager, *others = ways
    number = sum(way.layout is not None for way in ways)
    runs = [runner.run(exact, f"1/{number}")]
    if runs[0].figures.get("cannot_pack"):  # which the model itself has shown
        runner.tell(_ONE_BY_ONE)
        exact, eager = (unpacked(way, chosen) for way in (exact, eager))
        runs = [runner.run(exact, f"1/{number}")]
    runs.append(runner.run(eager, f"2/{number}"))
    if runs[1].status != "trained":
        raise RecipeError(f"eager mode does not train this recipe, so that nothing can be "
                          f"compared: {runs[1].reason}")  # fmt: skip
    if runs[0].status != "trained":
        runner.tell(f"no higher precision: {runs[0].reason}; a second eager run takes its place")
        runs[0] = runner.run(second_eager(eager, chosen), f"1/{number}")
        if runs[0].status != "trained":
            raise RecipeError(f"there is no reference to compare with: {runs[0].reason}")
    at = 2
    for way in others:
        at += way.layout is not None
        left = sum(other.layout is not None for other in others[others.index(way) :])
        if way is others[0]:
            spent = sum(run.seconds for run in runs) / 2
            runner.tell(f"about {duration(spent * left)} left")
        runs.append(runner.run(way, f"{at}/{number}"))
    return runs


def _compared(runs: Sequence[Run], chosen: Selection) -> tuple[list[Row], Allowed]:
    """A row for each run, the reference's first, and the limits that eager mode sets."""
    reference, eager, *others = runs

    def off(run: Run) -> Deviations:
        return deviations(run.figures, run.folder, reference.figures, reference.folder)

    measured = off(eager)
    each = chosen.trained // len(chosen.steps)
    limits = Allowed.of(measured, eager.figures["dtype"], each)
    rows = [Row(reference, None, "reference"), Row(eager, measured, "limit")]
    for run in others:
        if run.status != "trained":
            rows.append(Row(run, None, run.status, [run.reason]))
            continue
        folders = (run.folder, eager.folder, reference.folder)
        drift = drift_of(*folders, eager.figures["dtype"], chosen.trained_in(0))
        deviation = dataclasses.replace(off(run), drift=drift)
        problems = exceeded(deviation, limits)
        rows.append(Row(run, deviation, "failed" if problems else "passed", problems))
        if (figures := run.figures.pop("merged", None)) is not None:
            rows.append(_merged(figures))
    return rows, limits


def _judge_again(rows: Sequence[Row], limits: Allowed, chosen: Selection, runner: Runner) -> None:
    """Judge by several draws, in place, the rows that a single one may have failed."""
    doubtful = [
        row for row in rows
        if row.verdict == "failed" and row.deviations and may_be_luck(row.deviations, limits)
    ]  # fmt: skip
    if not doubtful:
        return
    draws, folder = draws_of(chosen), runner.folder / "draws"
    folder.mkdir()
    write_samples(folder / SAMPLES, draws.samples)
    again = dataclasses.replace(runner, steps=len(draws.steps), folder=folder)
    runner.tell(
        f"{', '.join(row.run.way.name for row in doubtful)}: the first step is beyond the limit, "
        f"by no more than luck may explain: {again.steps} steps with the initial weights decide"
    )
    runs: list[Run] = []
    for row in (*rows[:2], *doubtful):
        number = f"{len(runs) + 1}/{len(doubtful) + 2}"
        runs.append(again.run(in_draws(row.run.way, chosen), number))
        if len(runs) <= 2 and runs[-1].status != "trained":
            return
    exact, eager, *others = runs

    def off(row: Row, run: Run) -> Deviations:
        assert row.deviations is not None
        return over_draws(row.deviations, run.figures, run.folder, exact.figures, exact.folder)

    dtype, each = eager.figures["dtype"], draws.trained // again.steps
    limits = Allowed.of(off(rows[1], eager), dtype, each)
    for row, run in zip(doubtful, others, strict=True):
        if run.status == "trained":
            drift = drift_of(run.folder, eager.folder, exact.folder, dtype, draws.trained)
            row.deviations = dataclasses.replace(off(row, run), drift=drift)
            row.limits, row.first = limits, row.exceeded
            row.exceeded = exceeded(row.deviations, limits)
            row.verdict = "failed" if row.exceeded else "passed"


def _merged(figures: dict[str, Any]) -> Row:
    """The row of a merged model, from what ``compare_merged`` has returned."""
    way = Way("merged", optimize=False)
    for status in ("skipped", "failed"):
        if reason := figures.get(status):
            return Row(Run(way, status, reason), None, status, [reason])
    result = Merged(**figures)
    problem = (
        f"the logits of the merged model are off by {result.off:.1e} from the adapter's, and "
        f"{result.allowed:.1e} is allowed"
    )
    verdict = "passed" if result.passed else "failed"
    return Row(Run(way, "merged", figures=figures), None, verdict, [problem] * (not result.passed))


# --- processes: each way has its own, so no state is shared, and memory is counted from zero ------


_POLL = 0.1
_OTHERS = 20.0
"""Seconds that the other processes of a way get to end, once one has failed."""
_LAST = 12
"""Lines of a process's output that are shown when a signal has ended it, as a traceback of it."""
_ERROR = re.compile(r"(?:\[rank\d+\]:\s)?(\w[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")
"""The last line of a traceback."""


@dataclass
class Run:
    """The result of running one way.

    Attributes:
        status: ``"trained"``; ``"skipped"``: it cannot be run here; ``"failed"``: it should have.
        reason: why it was skipped or failed.
        folder: where its tensors are.
        figures: what its ``worker`` has counted.
        seconds: that it took, loading included.
    """

    way: Way
    status: str
    reason: str = ""
    folder: Path = Path()
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_way(
    recipe: Recipe, way: Way, steps: int, folder: Path, consent: Consent, say: Callable[[str], None]
) -> Run:
    """Run one way to its end, and return the result.

    ``recipe`` is the user's. ``way`` has a layout, unless it is skipped. ``folder``, that of all
    ways, has the samples, and gets a folder for this one. Its processes have ended at the return,
    whatever happens here.
    """
    if way.layout is None:
        return Run(way, "skipped", way.skipped)
    way_folder = folder / way.name.replace(" ", "-")
    shutil.rmtree(way_folder, ignore_errors=True)  # of one that could not pack
    way_folder.mkdir()
    changed = recipe_of(recipe, way, steps, str(way_folder / "out"))
    keys = changed.model_dump(mode="json", exclude_defaults=True)
    job = Job(keys, consent, way.exact, way.layout.sequences, way.merges, way.fixed_weights)
    job.write(way_folder)
    start = time.monotonic()
    with _started(way_folder, way.layout.processes) as processes:
        code = _wait(processes, way_folder, say)
    return _ended(way, way_folder, code, time.monotonic() - start)


def _ended(way: Way, folder: Path, code: int, seconds: float) -> Run:
    result: dict[str, Any] = {}
    if (folder / RESULT).exists():
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if code == 0 and result.get("status") == "trained":
        return Run(way, "trained", "", folder, result, seconds)
    if result.get("status") == "refused":
        status = "skipped" if way.optional else "failed"
        return Run(way, status, str(result["reason"]), folder, result, seconds)
    return Run(way, "failed", _reason(folder, code), folder, {}, seconds)


def _reason(folder: Path, code: int) -> str:
    printed = [
        [line.rstrip() for line in text.splitlines() if line.strip()]
        for path in sorted(folder.glob("*.err"))
        if (text := path.read_text(encoding="utf-8", errors="replace"))
    ]
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "its process was killed by SIGKILL (the system does that when memory is short)"
        message = "\n  ".join(line for lines in printed for line in _last(lines)) or "nothing"
        return f"its process was killed by {name}; what was last printed:\n  {message}"
    lines = [line for texts in printed for line in texts]
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    causes = [message for message in errors if "ProcessLostError" not in message] or errors
    message = causes[0] if causes else (lines or ["it printed nothing"])[-1].strip()
    return f"its process ended with exit code {code}: {message}"


def _last(lines: list[str]) -> list[str]:
    """What a process printed around its end: what faulthandler begins with, if it wrote that."""
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python")), None)
    return lines[-_LAST:] if fatal is None else lines[max(fatal - 4, 0) : fatal + _LAST]


@contextlib.contextmanager
def _started(folder: Path, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a worker; none is left afterwards, whatever ends the block."""
    worker = ["-P", "-X", "faulthandler", "-m", "fusewright.train.proof.worker", str(folder)]
    command = [sys.executable, *worker]
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        store = _store() if number > 1 else None
        try:
            for rank in range(number):
                out = stack.enter_context((folder / f"rank-{rank}.out").open("wb"))
                err = stack.enter_context((folder / f"rank-{rank}.err").open("wb"))
                environ = {**os.environ, PARENT: str(os.getpid())}
                if store is not None:
                    environ = rank_environment(rank, number, store.port)
                # in its own session: Ctrl-C in a terminal is for this process to handle
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                        env=environ, start_new_session=True,
                    )
                )  # fmt: skip
            yield processes
        finally:
            _kill(processes)


def _store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # 2026-11-27: not in its list

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes, and those that they have started (compilers, readers)."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], folder: Path, say: Callable[[str], None]
) -> int:
    """Wait for all, and pass on what rank 0 prints; return the exit code of the first failure."""
    since: float | None = None
    first = 0
    with (folder / "rank-0.out").open(encoding="utf-8", errors="replace") as lines:
        rest = ""
        while True:
            running = [process for process in processes if process.poll() is None]
            *whole, rest = (rest + lines.read()).split("\n")
            for line in whole:
                say(f"  {line}")
            first = first or next((p.returncode for p in processes if p.returncode), 0)
            if not running:
                return first
            if first:
                since = since or time.monotonic()
                if time.monotonic() - since > _OTHERS:
                    return first
            time.sleep(_POLL)


# --- the table and the JSON ----------------------------------------------------------------------


VERDICTS = {"passed": "passed", "failed": "FAILED", "skipped": "skipped"}


@dataclass
class Row:
    """The comparison of one way.

    Attributes:
        deviations: how far it is from the reference; None: of the reference, or it was not trained.
        verdict: ``"reference"``, ``"limit"`` (eager mode, which sets it), ``"passed"``,
            ``"failed"`` or ``"skipped"``.
        exceeded: what differs, a clause each; or why it failed to run.
        first: the same by the first step alone, if several draws of it have decided.
        limits: those by which they did.
    """

    run: Run
    deviations: Deviations | None
    verdict: str
    exceeded: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    limits: Allowed | None = None


@dataclass
class Comparison:
    """The comparison of all ways of one recipe; ``rows`` are by way, the reference first."""

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
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("way", "batches"):
            grid.add_column(name, no_wrap=True)
        for name in (
            "loss", "loss off", "gradients off", "bias", "change off", "tokens/s", "peak memory"
        ):  # fmt: skip
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("", no_wrap=True)
        for row in self.rows:
            if row.run.status == "trained":
                grid.add_row(*map(Text, self._cells(row)))
            elif row.run.status == "merged":
                found = Merged(**row.run.figures)
                losses = f"{found.loss_adapter:.4f} → {found.loss_merged:.4f}"
                grid.add_row("merged", "-", losses, *["-"] * 6, VERDICTS[row.verdict])
            else:
                layout = row.run.way.layout
                cells = [row.run.way.name, layout.text() if layout else "-", *["-"] * 7]
                grid.add_row(*map(Text, [*cells, VERDICTS[row.verdict]]))
            if row.verdict == "limit":
                of = self.limits
                offs = [f"{of.loss:.1e}", f"{of.gradient:.1e}", "", f"{of.change:.1e}"]
                grid.add_row(*map(Text, ["  allowed", "", "", *offs, "", "", ""]))
        return grid

    def _cells(self, row: Row) -> list[str]:
        run, deviations = row.run, row.deviations
        assert run.way.layout is not None
        losses = run.figures["losses"]
        offs = ["-"] * 4
        if deviations is not None:
            bias = "-" if math.isnan(deviations.bias) else f"{deviations.bias:+.1e}"
            loss, gradient, change = (
                f"{d:.1e}" for d in (deviations.loss, deviations.gradient, deviations.change)
            )
            offs = [loss, gradient, bias, change]
        name = run.way.name
        verdict = VERDICTS.get(row.verdict, "")
        if row.verdict == "reference":
            verdict = f"the reference, in {run.figures['dtype']}"
        return [
            name, run.way.layout.text(), f"{losses[0]:.4f} → {losses[-1]:.4f}", *offs,
            f"{self.rate(run):,.0f}", _peaks(run), verdict,
        ]  # fmt: skip

    def sentences(self) -> Iterator[str]:
        """The sentences below the table."""
        masks = sorted({mask for row in self.rows for mask in row.run.figures.get("masks", ())})
        yield (
            f"off: relative to the reference; gradients are those of the first step, and the "
            f"change is that of the weights in all steps, without the {LEFT_OUT:.0%} that are "
            f"furthest off. Allowed is {FACTOR} times what eager mode is off, and one unit of "
            f"rounding. The bias is that of all gradients' errors together: what chance and eager "
            f"mode do not explain, in any kind of weights, fails."
        )
        yield (
            "Random masks differ between layouts, so lora_dropout, neftune_noise_alpha and the "
            "model's own dropout are 0 in all ways"
            + (f" (this recipe or model has {', '.join(masks)})" if masks else "")
            + "; adapters that begin as zeros begin with small random values."
        )
        for row in self.rows:
            if row.run.status == "merged":
                yield _cost(Merged(**row.run.figures))
            if row.verdict == "skipped":
                yield f"{row.run.way.name}: skipped: {row.run.reason}"
            if row.deviations is not None and row.limits is not None:
                yield (
                    f"{row.run.way.name}: judged by {row.deviations.draws} steps with the initial "
                    f"weights, whose errors are taken together ({row.limits.gradient:.1e} is "
                    f"allowed for all gradients), as {'; '.join(row.first)}"
                )
        for row in self.failed:
            yield f"{row.run.way.name}: FAILED: {'; '.join(row.exceeded)}. {self._advice(row)}"

    def _advice(self, row: Row) -> str:
        name = row.run.way.name
        if row.run.status not in ("trained", "merged"):
            return "It did not run to its end; --keep keeps all that it printed (*.err)"
        broken = {other.run.way.name for other in self.failed}
        if name == "merged":
            return "Do not use what fusewright merge makes of this adapter, and report it"
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
        result: dict[str, Any] = finite(content)
        return result

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
            "deviations": dataclasses.asdict(row.deviations) if row.deviations else None,
            "by_first_step": row.first,
            "limits": dataclasses.asdict(row.limits) if row.limits else None,
            "tokens_per_s": self.rate(run),
            "run_seconds": run.seconds,
            **figures,
        }


def _cost(merged: Merged) -> str:
    """What merging does to the loss, and to the logits."""
    text = (
        f"merged: the adapter of the optimized way, merged into {merged.dtype}: the loss of "
        f"{merged.tokens} tokens goes from {merged.loss_adapter:.4f} to {merged.loss_merged:.4f}, "
        f"and logits are off by {merged.off:.1e}. Allowed is {merged.allowed:.1e}: {FACTOR} times "
        "what one unit of rounding in each weight does."
    )
    if abs(merged.loss_trained - merged.loss_adapter) > 1e-3 * abs(merged.loss_adapter):
        text += (
            f" On the base that it was trained on, its loss is {merged.loss_trained:.4f}; "
            "fusewright merge --dequantize merges into those weights."
        )
    return text


def _peaks(run: Run) -> str:
    """The peak memory of each process: of its GPU where it has one."""
    each: Sequence[dict[str, float]] = run.figures.get("memory", ())
    return " + ".join(memory(peaks.get("cuda_mb", peaks["rss_mb"])) for peaks in each)


# --- the recipe of a way: the user's, without output, validation, random draws and reports --------


def _defaults(group: type[Keys]) -> dict[str, Any]:
    """The keys of a group, each as if it were unset."""
    fields = group.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields}


_OFF: dict[str, Any] = {
    # trackers: each has a switch, without which other keys would imply it
    **{
        name: False if name.startswith("use_") else default
        for name, default in _defaults(TrackingKeys).items()
    },
    # where results would go, when they would be saved, validation, and what is logged
    **_defaults(OutputKeys), "save_strategy": "no", "dataset_prepared_path": None,
    "val_set_size": 0.0, "test_datasets": [],
    # what ends a run early
    "early_stopping_patience": None, "loss_watchdog_threshold": None,
    # the rows are prepared, and come in order
    "streaming": False, "pretraining_dataset": [], "curriculum_sampling": True,
    "group_by_length": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_drop_last": False, "batch_size": None,
    # the ways are compared with each other
    "audit": False,
    # random masks, which no two layouts have alike
    "lora_dropout": 0.0, "neftune_noise_alpha": None,
    # every step moves the weights
    "lr_scheduler": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": None, "eta_min": None, "cosine_min_lr_ratio": None,
    "cosine_constant_lr_ratio": None,
    "lr_quadratic_warmup": False, "lr_div_factor": None, "jagged_restart_steps": None,
    "jagged_restart_warmup_steps": None, "jagged_restart_anneal_steps": None,
}  # fmt: skip
"""Keys that are turned off in all ways, with the values that do it."""

_ALONE: dict[str, Any] = {
    "fsdp": None, "fsdp_config": None, "deepspeed": None, "dp_shard_size": None,
    "dp_replicate_size": None, "tensor_parallel_size": 1, "context_parallel_size": 1,
    "context_parallel": None, "ddp": None,
}  # fmt: skip
"""The same for ways of one process."""


def alone(recipe: Recipe) -> Recipe:
    """The recipe of all ways of one process."""
    return recipe.model_copy(update={**_OFF, **_ALONE})


def recipe_of(recipe: Recipe, way: Way, steps: int, folder: str) -> Recipe:
    """The recipe by which one way, which has a layout, trains ``steps`` steps into ``folder``."""
    layout = way.layout
    assert layout is not None
    changed = {
        **_OFF,
        **(_ALONE if layout.processes == 1 else {}),
        "output_dir": folder,
        "optimize": way.optimize,
        "sample_packing": layout.packing,
        "micro_batch_size": layout.rows,
        "gradient_accumulation_steps": layout.passes,
        "max_steps": steps,
    }
    return recipe.model_copy(update=changed)
