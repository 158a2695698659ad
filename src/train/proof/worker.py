"""One way in a process of its own: ``python -m fusewright.train.proof.worker FOLDER``.

The folder has ``job.json`` and the samples. What comes of it is written there: ``result.json``,
which says how it ended, and the tensors of ``record``. Standard output has a line for each step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import DataError, FusewrightError, RecipeError
from ..consent import Consent
from ..data import Packs, Sample
from ..model.load import quiet
from ..model.tokenizer import load_tokenizer
from ..output_files import write_atomically
from ..processes.mesh import is_sharded
from ..processes.signals import Interrupts
from ..processes.world import PARENT, World, end_with_parent, joined
from ..recipe.recipe import Recipe
from ..report.throughput import ThroughputMeter
from ..terminal import Terminal
from ..trainer.build import make_trainer
from ..trainer.context import Context
from ..trainer.ready import optimize_model, ready_model
from .exact import exact_dtype, make_exact
from .record import PeakMemory, ProofTrainer, Record, compared
from .ways import FILLER

JOB, RESULT, SAMPLES = "job.json", "result.json", "samples.json"

SPREAD = 0.01
"""The standard deviation of what takes the place of adapters that begin as zeros."""


@dataclass(frozen=True)
class Job:
    """What a worker is asked for, as ``job.json`` holds it.

    Attributes:
        recipe: the keys of the way's recipe that are not at their defaults.
        consent: the switches that the caller has given.
        exact: whether to compute in a higher precision.
        sequences: of the layout.
    """

    recipe: dict[str, Any]
    consent: Consent
    exact: bool
    sequences: tuple[tuple[int, ...], ...]

    def write(self, folder: Path) -> None:
        """Write it into the folder of a worker."""
        values = {**vars(self), "consent": vars(self.consent)}
        (folder / JOB).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """What ``write`` has written."""
        values = json.loads((folder / JOB).read_text(encoding="utf-8"))
        sequences = tuple(tuple(sequence) for sequence in values["sequences"])
        return cls(values["recipe"], Consent(**values["consent"]), values["exact"], sequences)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write the samples of all ways."""
    rows = [[sample.input_ids, sample.labels] for sample in samples]
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_samples(path: Path) -> list[Sample]:
    """What ``write_samples`` has written."""
    return [Sample(*row) for row in json.loads(path.read_text(encoding="utf-8"))]


def main(folder: Path) -> int:
    """Run the job in ``folder``, and write how it ended.

    Returns:
        0: it trained; 2: it was refused; 3: there was not enough memory.
    """
    job = Job.read(folder)
    try:
        recipe = Recipe.model_validate(job.recipe).allowed(job.consent)
        with joined(recipe.ddp_timeout) as world, Interrupts(world) as interrupts, quiet():
            result = _train(folder, job, recipe, world, interrupts)
    except (RecipeError, DataError) as error:
        return _end(folder, 2, {"status": "refused", "reason": str(error)})
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, FusewrightError) or not _no_memory(error):
            raise
        reason = "there was not enough memory for this way"
        return _end(folder, 3, {"status": "refused", "reason": reason})
    return _end(folder, 0, {"status": "trained", **result})


def _no_memory(error: BaseException) -> bool:
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in known)


def _end(folder: Path, code: int, result: dict[str, Any]) -> int:
    if os.environ.get("RANK", "0") == "0" or code:
        write_atomically(folder / RESULT, json.dumps(result))
    return code


def _train(
    folder: Path, job: Job, recipe: Recipe, world: World, interrupts: Interrupts
) -> dict[str, Any]:
    """Train the steps; what ``result.json`` has of them."""
    strategy = recipe.strategy()
    strategy.require_world(world.size)
    tokenizer = load_tokenizer(recipe)
    model = ready_model(recipe, tokenizer, _ignore, on_cpu=is_sharded(strategy, world))
    dtype = torch.float16 if recipe.precision() == "float16" else model.dtype
    masks = without_dropout(model)
    fill_zeros(model, recipe.seed)
    if job.exact:
        dtype = exact_dtype(model, dtype)
        recipe = make_exact(model, recipe, dtype)
    record = Record(model, folder, world.main)
    optimize_model(model, recipe)
    console = Terminal(quiet=True)
    context = Context(recipe, tokenizer, console, interrupts, ThroughputMeter(), world=world)
    samples = read_samples(folder.parent / SAMPLES)
    numbers = [[i if i != FILLER else len(samples) - 1 for i in s] for s in job.sequences]
    trainer: Any = make_trainer(context, model, Packs(samples, numbers), kind=ProofTrainer)
    trainer.record = record
    peak = PeakMemory()
    trainer.train()
    peaks = world.gather(peak.peak())
    record.keep_changes()
    return {
        "losses": record.losses,
        "norms": record.norms,
        "seconds": context.meter.seconds,
        "memory": peaks,
        "dtype": str(dtype).removeprefix("torch."),
        "device": model.device.type,
        "stride": record.stride,
        "masks": masks,
        "weighs_tokens": bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func),
        **_rewrites(model, recipe),
    }


def _ignore(text: str) -> None:
    """Print nothing: the user knows the run's usual lines."""


def without_dropout(model: nn.Module) -> list[str]:
    """Set what a model draws at random in training to nothing; return what had been set.

    Modules for dropout, and the attributes that attention and routers read.
    """
    found = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            found.add("dropout")
            module.p = 0.0
        for name, value in vars(module).items():
            random = "dropout" in name or "jitter" in name
            if random and isinstance(value, float) and value:
                found.add(name)
                setattr(module, name, 0.0)
    return sorted(found)


def fill_zeros(model: nn.Module, seed: int) -> None:
    """Give trained tensors that are all zeros small random values, the same in every way.

    A new adapter's second matrix begins as zeros, and so the gradient of its first one is zero in
    the first step, where gradients can be compared best.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in compared(model):
        if not bool(parameter.detach().any()):
            drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
            parameter.data.copy_(drawn)


def _rewrites(model: Any, recipe: Recipe) -> dict[str, Any]:
    """What was rewritten, by rule."""
    if not recipe.optimize:
        return {"rewritten": {}, "codegen": None}
    from ...compiler.pipeline import explain

    report = explain(model)
    return {"rewritten": dict(report.by_rule()), "codegen": report.codegen}


if __name__ == "__main__":
    os.environ.setdefault(PARENT, str(os.getppid()))
    end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
