"""``fusewright eval``: loss and perplexity of a run, on its own validation rows or other ones."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ...errors import DataError, ModelError
from ..checkpoint.ownership import link_in
from ..data import PreparedData, Samples, prepare
from ..methods.task import task_of
from ..model.load import quiet
from ..output_files import write_atomically
from ..processes.world import World
from ..processing import Processing
from ..recipe.preferences import method_of
from ..recipe.recipe import Recipe
from ..report.environment import machine, versions
from ..terminal import Terminal, announce, say
from ..trainer.build import featurizer_for
from ..trainer.evaluation import Batches, Loss, validate
from .load_run import load_model_of, load_processing
from .run_folder import RunFolder
from .run_recipe import recipe_with, written


@dataclass(frozen=True)
class EvalMetrics:
    """The metrics of a model on one dataset.

    Attributes:
        loss: mean over the tokens that have a label, in nats; of a preference method, its own, mean
            over the rows; None of a method that is judged by rewards.
        perplexity: its exponential; None of a preference method, and of distillation.
        samples: rows, or pieces of texts.
        trained_tokens: those of them that have a label.
        figures: further metrics of a preference method, e.g. ``rewards/margins``.
    """

    loss: float | None
    perplexity: float | None
    samples: int
    tokens: int
    trained_tokens: int
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> float:
        """The loss; of a method that is judged by rewards, their mean."""
        return self.figures["reward"] if self.loss is None else self.loss


def evaluate(
    run: RunFolder,
    files: Sequence[Path] = (),
    *,
    as_json: bool = False,
    console: Console | None = None,
) -> Path:
    """Compute the loss of ``run``, print it, and write it to a file, whose path is returned.

    Masks, the limit of length and packing are those of the run's recipe. A folder without
    ``run.json`` is taken for one that was trained on chats, with the defaults of a recipe.
    ``files`` are datasets, read as the first one of the recipe was, by default the rows that the
    run held out for validation. The file is ``eval.json`` in the run's folder, and that of datasets
    ``eval-NAME-HASH.json``, with the first one's name and a hash of their paths. With ``as_json``
    only its content is printed.

    Raises:
        ModelError: the run cannot be loaded, or held out no rows.
        DataError: a dataset cannot be used.
        RecipeError: the base of the run cannot be loaded.
    """
    console = console or Terminal(highlight=False)
    recorded = None if files else _recorded(run)
    recipes = {str(f): _reading(run, f) for f in files} if files else {"": _run_recipe(run)}
    with quiet():
        processing = load_processing(run)
        rows = {  # before the model, which takes longer to load
            name: _prepare(run, name, recipe, processing, None if as_json else console)
            for name, recipe in recipes.items()
        }
        model = load_model_of(run)
        if any(recipe.optimize for recipe in recipes.values()):
            from ...compiler.pipeline import optimize

            optimize(model, codegen="eager")  # a compilation would take longer than it saves
        metrics: dict[str, EvalMetrics] = {}
        for name, recipe in recipes.items():
            prepared = rows[name]
            announce(f"evaluating {name or 'the validation rows'}")
            if method_of(recipe) is not None:
                metrics |= _by_method(model, recipe, processing, prepared, console)
            else:
                metrics |= _by_token(model, recipe, processing, prepared)
    path = _write(run, _file_name(files), metrics, recorded)
    if as_json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        _print(metrics, recorded, console)
        say(console, f"written to {path}")
    return path


def held_out(
    run: RunFolder, files: Sequence[Path], processing: Any, console: Console | None = None
) -> tuple[str, list[Samples]]:
    """Rows to judge a model of ``run`` on, and what they are, in words.

    Those of ``files``; else the run's validation rows; else, where it held out none, every tenth of
    its training rows. None where the run has no ``run.json``, or streams its rows.

    Raises:
        DataError: a dataset cannot be used.
    """
    if files:
        found = [_prepare(run, str(f), _reading(run, f), processing, console) for f in files]
        return ", ".join(f.name for f in files), [s for p in found for s in p.validation.values()]
    if not run.recipe:
        return "none", []
    recipe = recipe_with(run, {})
    prepared = prepare(recipe, processing, console, day=_day(run))
    if recipe.validates():
        return "the run's validation rows", list(prepared.validation.values())
    if not isinstance(prepared.train, Samples):
        return "none", []
    return "every tenth training row", [prepared.train[::10]]


def _prepare(
    run: RunFolder, file: str, recipe: Recipe, processing: Any, console: Console | None
) -> PreparedData:
    """The rows to evaluate; those of a ``file`` are used as a whole."""
    prepared = prepare(recipe, processing, console, day=_day(run))
    if not file:
        return prepared
    return replace(prepared, validation={file: cast("Samples", prepared.train)})


def _day(run: RunFolder) -> str | None:
    """The date that templates wrote in training; None if that is not known."""
    started = run.facts.get("started")
    return started[:10] if isinstance(started, str) else None


def _run_recipe(run: RunFolder) -> Recipe:
    """The recipe that ``run`` was trained with, and which held out rows."""
    if not run.recipe:
        raise ModelError(
            f"{run.folder} has no run.json, so its validation rows are unknown; name a dataset: "
            "--data FILE"
        )
    recipe = recipe_with(run, {})
    if not recipe.validates():
        raise ModelError(
            f"{run.folder}: the run held out no rows (val_set_size: 0); name a dataset: --data FILE"
        )
    return recipe


def _reading(run: RunFolder, file: Path) -> Recipe:
    """The same recipe, with ``file`` in place of its datasets."""
    if not file.exists():
        raise DataError(f"{file}: file not found")
    keys = written(run.recipe)
    described = (keys.get("datasets") or [_streamed(keys)])[0]
    for key in _OF_ONE_PLACE:
        described.pop(key, None)
    limit = run.recipe.get("eval_sequence_len") or run.recipe.get("sequence_len")
    return recipe_with(
        run,
        {
            **dict.fromkeys(_OF_ALL),
            "datasets": [{**described, "path": str(file.resolve())}],
            "sequence_len": limit,
        },
    )


def _streamed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The reading of rows in a run without ``datasets``, as an entry of these."""
    if not keys.get("pretraining_dataset"):
        return {"type": "chat_template"}
    entry = {"type": "pretrain", **keys["pretraining_dataset"][0]}
    column = entry.pop("text_column", None)
    return {**entry, "field": column} if column else entry


_OF_ONE_PLACE = ("builder", "data_files", "split", "name", "revision", "weight", "shards",
                 "shards_idx", "preprocess_shards", "ds_type", "skip")  # fmt: skip
"""Keys of a dataset about the location of its rows, not the reading of them."""

_OF_ALL = ("test_datasets", "pretraining_dataset", "streaming", "val_set_size",
           "dataset_shard_num", "dataset_shard_idx", "dataset_exact_deduplication")  # fmt: skip
"""Keys that choose among the rows of all datasets."""


def _by_method(
    model: Any, recipe: Recipe, processing: Processing, prepared: PreparedData, console: Console
) -> dict[str, EvalMetrics]:
    from ..methods.evaluate import measured

    begun = time.perf_counter()
    figures = measured(model, recipe, processing, prepared, console)
    seconds = (time.perf_counter() - begun) / max(1, len(figures))
    return {
        name: _metrics(of.pop("loss", None), prepared.validation[name], seconds, None, of)
        for name, of in figures.items()
    }


def _by_token(
    model: Any, recipe: Recipe, processing: Processing, prepared: PreparedData
) -> dict[str, EvalMetrics]:
    """The loss per trained token of each dataset, computed as in the recipe's validation."""
    task = task_of(recipe)
    tokenizer = processing.tokenizer
    featurizer = featurizer_for(model, recipe, processing, prepared.has_extra())
    return {
        name: _measure(model, batches, prepared.validation[name], task.loss)
        for name, batches in task.validation(prepared, tokenizer, World(), featurizer).items()
    }


def _measure(model: Any, batches: Batches, samples: Samples, loss_of: Loss | None) -> EvalMetrics:
    begun = time.perf_counter()
    loss = validate(model, {"": batches}, announce, loss=loss_of)["eval_loss"]
    perplexity = None
    if loss_of is None:  # else it is no likelihood
        perplexity = math.exp(loss) if loss < 700 else math.inf  # where exp ends in float64
    return _metrics(loss, samples, time.perf_counter() - begun, perplexity)


def _metrics(
    loss: float | None,
    samples: Samples,
    seconds: float,
    perplexity: float | None,
    figures: Mapping[str, float] | None = None,
) -> EvalMetrics:
    return EvalMetrics(
        loss, perplexity, len(samples), int(samples.lengths.sum()), int(samples.trained.sum()),
        seconds, dict(figures or {}),
    )  # fmt: skip


def _whole(results: dict[str, EvalMetrics]) -> float:
    """The summary of all datasets: the loss per trained token, or a method's per row."""
    rows = {n: of.samples if of.figures else of.trained_tokens for n, of in results.items()}
    return sum(of.judged * rows[name] for name, of in results.items()) / sum(rows.values())


def _recorded(run: RunFolder) -> float | None:
    loss = run.facts.get("val_loss_after")
    return run.facts.get("val_reward_after") if loss is None else loss


def _figure(results: dict[str, EvalMetrics]) -> str:
    return "reward" if any(of.loss is None for of in results.values()) else "loss"


def _file_name(files: Sequence[Path]) -> str:
    """Where the figures go: the same for the same datasets, and another one for others."""
    if not files:
        return "eval.json"
    digest = hashlib.sha256("\n".join(str(f.resolve()) for f in files).encode(errors="replace"))
    stem = re.sub(r"[^\w.-]", "_", files[0].stem, flags=re.ASCII)[:60]
    return f"eval-{stem}-{digest.hexdigest()[:6]}.json"


def _write(
    run: RunFolder, name: str, results: dict[str, EvalMetrics], recorded: float | None
) -> Path:
    content = {
        _figure(results): _whole(results),
        "results": {name: asdict(figures) for name, figures in results.items()},
        f"recorded_val_{_figure(results)}": recorded,
    }
    return write_results(run, name, content)


def write_results(run: RunFolder, name: str, content: Mapping[str, Any]) -> Path:
    """Write figures of ``run`` to a file of its folder, with date, versions and machine.

    Returns its path. Raises a ModelError if it cannot be written.
    """
    path = run.folder / name
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = {
        "run": str(run.folder), "date": date, **content, "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    link = link_in(run.folder)
    if link is not None:
        raise ModelError(f"{link} is a symbolic link; {path.name} would be written elsewhere")
    try:
        write_atomically(path, json.dumps(whole, indent=2) + "\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _print(results: dict[str, EvalMetrics], recorded: float | None, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("dataset", no_wrap=True)
    with_perplexity = any(of.perplexity is not None for of in results.values())
    trained = any(of.trained_tokens for of in results.values())  # none of prompts
    for name in (
        _figure(results),
        *(["perplexity"] if with_perplexity else []),
        "samples",
        "tokens",
        *(["trained"] if trained else []),
    ):
        table.add_column(name, justify="right")
    for name, of in results.items():
        counts = (of.samples, of.tokens, *([of.trained_tokens] if trained else []))
        perplexity = [] if of.perplexity is None else [f"{of.perplexity:.3f}"]
        table.add_row(name, f"{of.judged:.4f}", *perplexity, *(f"{n:,}" for n in counts))
    console.print(table)
    for name, of in results.items():
        if of.figures:
            figures = ", ".join(f"{key} {value:.4g}" for key, value in of.figures.items())
            say(console, f"{name}: {figures}")
    if len(results) > 1:
        say(console, f"all datasets: {_whole(results):.4f}")
    if recorded is not None:
        say(console, f"recorded after training: {recorded:.4f}")
