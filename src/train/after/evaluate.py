"""``fusewright eval``: loss and perplexity of a run, on its own validation rows or other ones."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...errors import DataError, ModelError
from .. import report
from ..chat import Sample, encode
from ..data import read_chats, split
from ..export import pad_token
from ..model import quiet
from ..packing import count, pack
from ..recipe import Recipe
from ..trainer import batches, validation_loss
from .oldrecipe import recipe_with, written
from .runfolder import Run, load_run


@dataclass(frozen=True)
class Figures:
    """What a model makes of one dataset.

    Attributes:
        loss: mean over the tokens that have a label, in nats.
        perplexity: its exponential.
        samples: rows that were used.
        left_out: rows that were too long or had nothing to train.
        tokens: tokens of those that were used.
        trained_tokens: those of them that have a label.
        seconds: of the computation.
    """

    loss: float
    perplexity: float
    samples: int
    left_out: int
    tokens: int
    trained_tokens: int
    seconds: float


def evaluate(
    run: Run,
    files: Sequence[Path] = (),
    *,
    as_json: bool = False,
    console: Console | None = None,
) -> Path:
    """Compute the loss of ``run``, print it, and write it to ``eval.json`` in its folder.

    Masks, the limit of length and packing are those of the run's recipe. A folder without
    ``run.json`` is taken for one that was trained on chats, with the defaults of a recipe.

    Args:
        run: from ``open_run``.
        files: datasets, read as the first one of the recipe was. None: the rows that the run held
            out for validation.
        as_json: print what ``eval.json`` holds, and nothing else.
        console: where to print; None for standard output.

    Returns:
        The path of ``eval.json``.

    Raises:
        ModelError: the run cannot be loaded, or held out no rows.
        DataError: a dataset cannot be used.
        RecipeError: the base of the run cannot be loaded.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    recorded = None if files else run.facts.get("val_loss_after")
    with quiet():
        recipe = _with_files(run, files) if files else _own(run)
        model, tokenizer = load_run(run)
        samples = _samples(recipe, tokenizer, bool(files))
        if recipe.optimize:
            from ...pipeline import optimize

            optimize(model, codegen="eager")  # a compilation would take longer than it saves
        found = {
            name: _measure(model, recipe, kept, left_out, pad_token(tokenizer))
            for name, (kept, left_out) in samples.items()
        }
    path = _write(run, found, recorded)
    if as_json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        _print(found, recorded, console)
        console.print(f"written to {path}", markup=False)
    return path


def _own(run: Run) -> Recipe:
    """The recipe that ``run`` was trained with, and which held out rows."""
    if not run.recipe:
        raise ModelError(
            f"{run.folder} has no run.json, so nothing says which rows it was validated on; name "
            "a dataset: --data FILE"
        )
    recipe = recipe_with(run, {})
    if not recipe.val_set_size:
        raise ModelError(
            f"{run.folder}: the run held out no rows (val_set_size: 0); name others: --data FILE"
        )
    return recipe


def _with_files(run: Run, files: Sequence[Path]) -> Recipe:
    """The same recipe, with ``files`` in place of its datasets."""
    for file in files:
        if not file.exists():
            raise DataError(f"{file}: there is no such file")
    described = {**(written(run.recipe).get("datasets") or [{}])[0], "builder": None}
    datasets = [{**described, "path": str(file.resolve())} for file in files]
    return recipe_with(run, {"datasets": datasets})


def _samples(recipe: Recipe, tokenizer: Any, named: bool) -> dict[str, tuple[list[Sample], int]]:
    """Samples to measure, and how many rows are left out, by dataset.

    ``named``: whole files, each by its name; otherwise what the recipe holds out.
    """
    parts = (
        {Path(d.path).name: read_chats([d]) for d in recipe.datasets}
        if named
        else {"validation": split(read_chats(recipe.datasets), recipe.val_set_size, recipe.seed)[1]}
    )
    found = {}
    for name, chats in parts.items():
        samples = encode(chats, tokenizer, recipe.train_on_inputs)
        short = [s for s in samples if s.trained and len(s.input_ids) <= recipe.sequence_len]
        if not short:
            raise DataError(f"{name}: no row is left: all are too long or have nothing to train")
        found[name] = (short, len(samples) - len(short))
    return found


def _measure(
    model: Any, recipe: Recipe, samples: list[Sample], left_out: int, pad_id: int
) -> Figures:
    begun = time.perf_counter()
    packs = pack(samples, recipe.sequence_len) if recipe.sample_packing else [[s] for s in samples]
    loss = validation_loss(model, batches(packs, recipe, pad_id))
    tokens, trained = count(packs)
    return Figures(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,  # where exp ends in float64
        samples=len(samples),
        left_out=left_out,
        tokens=tokens,
        trained_tokens=trained,
        seconds=time.perf_counter() - begun,
    )


def _write(run: Run, found: dict[str, Figures], recorded: float | None) -> Path:
    """Write ``eval.json``, whole or not at all."""
    path = run.folder / "eval.json"
    content = {
        "run": str(run.folder),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": {name: asdict(figures) for name, figures in found.items()},
        "recorded_val_loss": recorded,
        "versions": report.versions(),
        "machine": report.machine(),
    }
    unfinished = path.with_suffix(".json.part")
    try:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _print(found: dict[str, Figures], recorded: float | None, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("dataset")
    for name in ("loss", "perplexity", "rows", "left out", "tokens", "trained"):
        table.add_column(name, justify="right")
    for name, of in found.items():
        counts = (of.samples, of.left_out, of.tokens, of.trained_tokens)
        table.add_row(name, f"{of.loss:.4f}", f"{of.perplexity:.3f}", *(f"{n:,}" for n in counts))
    console.print(table)
    if recorded is not None:
        console.print(f"at the end of its training the run had {recorded:.4f}", markup=False)
