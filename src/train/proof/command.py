"""``fusewright verify RECIPE``: the same steps in several ways, compared."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...errors import RecipeError
from ..data import prepare
from ..data.order import order_of
from ..model.from_pretrained import meta_model
from ..model.load import load_config, quiet
from ..model.precision import dtype_for_training
from ..model.tokenizer import load_tokenizer
from ..output_files import write_atomically
from ..preflight import model_obstacles
from ..processes.signals import Interrupts
from ..recipe.preferences import method_of
from ..recipe.recipe import Recipe
from ..report.format import duration
from ..report.throughput import flops_per_token, peak_flops
from ..terminal import Terminal, say
from ..trainer.batches import training_sequences
from .compare import Allowed, Deviations, deviations, exceeded
from .run_ways import Run, run_way
from .settings import alone
from .table import Comparison, Row
from .ways import Selection, Way, second_eager, select, sequences_per_step, ways_of
from .worker import SAMPLES, write_samples

_START_SECONDS = 20.0
"""What a process takes until its first step, about: imports, and loading a small model."""
_SHARE_OF_PEAK = 0.3
"""Of the speed that a device has in large products, what a step of eager mode reaches, about."""


@dataclass(frozen=True)
class VerifyOptions:
    """What the command was asked for beside the recipe.

    Attributes:
        name: of the recipe, for the messages.
        steps: how many each way trains.
        processes: how many share the steps in the last way.
        json: a file for all figures; None: none is written.
        keep: whether the scratch folder stays.
    """

    name: str
    steps: int = 5
    processes: int = 2
    json: Path | None = None
    keep: bool = False


def verify(recipe: Recipe, options: VerifyOptions) -> int:
    """Compare the ways of a recipe, and print the table.

    Args:
        recipe: checked, with absolute paths. Nothing is written where it says.
        options: of the command.

    Returns:
        The exit code: 0 if all ways passed that were run, else 1.

    Raises:
        RecipeError: the recipe cannot be trained, not even in eager mode.
        DataError: a dataset cannot be used.
        Stopped: a signal came; all processes have ended and the scratch folder is gone.
    """
    if found := list(model_obstacles(alone(recipe))):
        raise RecipeError("\n  ".join(found))
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
        ways = ways_of(recipe, chosen, options.processes, _gpus())
        for line in _announcement(recipe, ways, chosen):
            tell(line)
        runs = _run(ways, chosen, Runner(recipe, options.steps, folder, tell))
        comparison = Comparison(options.name, chosen, *_compared(runs, chosen))
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


def _select(recipe: Recipe, steps: int, tell: Callable[[str], None]) -> Selection:
    """The samples of the first steps, in the order in which the recipe trains them."""
    tell("preparing the rows")
    prepared = prepare(recipe, load_tokenizer(recipe))
    sequences = training_sequences(prepared, recipe)
    size = sequences_per_step(recipe)
    in_order: Any = sequences
    if not recipe.streams():
        order = order_of(sequences, recipe, recipe.micro_batch_size)
        in_order = (sequences[i] for i in order)
    return select(islice(in_order, steps * size), steps, size)


# --- what is going to happen ---------------------------------------------------------------------


def _announcement(recipe: Recipe, ways: Sequence[Way], chosen: Selection) -> Iterator[str]:
    """What will be run, and how long it takes."""
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
    """What a way takes, about; None: not known. On a GPU a measurement would take its memory."""
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
    """Runs ways of one recipe.

    Attributes:
        recipe: the user's.
        steps: how many each way trains.
        folder: scratch, with the samples.
        tell: prints a line.
    """

    recipe: Recipe
    steps: int
    folder: Path
    tell: Callable[[str], None]

    def run(self, way: Way, number: str) -> Run:
        """Run one way, and say how it went."""
        if way.layout is not None:
            self.tell(f"{number} {way.name}: {way.layout.text()}")
        run = run_way(self.recipe, way, self.steps, self.folder, self.recipe.consent, self.tell)
        if way.layout is not None:
            how = f": {run.reason}" if run.reason else f" in {duration(run.seconds)}"
            self.tell(f"{number} {way.name}: {run.status}{how}")
        return run


def _run(ways: Sequence[Way], chosen: Selection, runner: Runner) -> list[Run]:
    """Run all of them; the first run of the result is the reference.

    Raises:
        RecipeError: the recipe is refused in eager mode.
    """
    exact, eager, *others = ways
    number = sum(way.layout is not None for way in ways)
    runs = [runner.run(exact, f"1/{number}"), runner.run(eager, f"2/{number}")]
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
        found = off(run)
        said = exceeded(found, limits)
        rows.append(Row(run, found, "failed" if said else "passed", said))
    return rows, limits
