"""One way in its own process: ``python -m fusewright.train.proof.worker FOLDER``.

The folder has ``job.json`` and the samples, and gets ``result.json``, which says how it ended, and
the tensors of ``record``. Standard output has a line for each step.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ...errors import DataError, FusewrightError, PackingError, RecipeError
from ...rewrite.verify_exact import Wide
from ..consent import Consent
from ..data import Packs, Sample
from ..data.images.reading import featurizer_of
from ..model.load import quiet
from ..model.precision import computes_in
from ..model.processor import load_processing
from ..model.quantize import dequantize_linears
from ..output_files import write_atomically
from ..processes.ending import ending_as_rank
from ..processes.mesh import is_sharded
from ..processes.signals import Interrupts
from ..processes.world import PARENT, World, end_with_parent, joined
from ..recipe.recipe import Recipe
from ..report.throughput import ThroughputMeter
from ..terminal import Terminal
from ..trainer.build import featurizer_for, make_trainer
from ..trainer.context import Context
from ..trainer.ready import optimize_model, ready_model, require_packing_of_images
from .compare import PeakMemory, ProofTrainer, Record, compared
from .merged import compare_merged, keep_adapter
from .ways import FILLER

JOB, RESULT, SAMPLES = "job.json", "result.json", "samples.json"

SPREAD = 0.01
"""The standard deviation of what replaces adapters that begin as zeros."""


@dataclass(frozen=True)
class Job:
    """The task of a worker, as ``job.json`` holds it.

    Attributes:
        recipe: the keys of the way's recipe that are not at their defaults.
        exact: whether to compute in a higher precision.
        merges: whether to merge the adapter afterwards, and compare it.
        fixed_weights: whether no step is to change the weights.
    """

    recipe: dict[str, Any]
    consent: Consent
    exact: bool
    sequences: tuple[tuple[int, ...], ...]
    merges: bool = False
    fixed_weights: bool = False

    def write(self, folder: Path) -> None:
        """Write it into the folder of a worker."""
        values = {**vars(self), "consent": vars(self.consent)}
        (folder / JOB).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read what ``write`` has written."""
        values = json.loads((folder / JOB).read_text(encoding="utf-8"))
        sequences = tuple(tuple(sequence) for sequence in values["sequences"])
        return cls(values["recipe"], Consent(**values["consent"]), values["exact"], sequences,
                   values["merges"], values["fixed_weights"])  # fmt: skip


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write the samples of all ways."""
    rows = [[sample.input_ids, sample.labels, sample.extra] for sample in samples]
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_samples(path: Path) -> list[Sample]:
    """Read what ``write_samples`` has written."""
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
            if job.merges:  # when the trained model has left the memory
                samples = read_samples(folder.parent / SAMPLES)[:-1]
                loss = result.pop("loss_trained")
                featurizer = featurizer_of(recipe, load_processing(recipe))
                result["merged"] = compare_merged(recipe, samples, loss, folder, featurizer)
    except (RecipeError, DataError) as error:
        cannot_pack = isinstance(error, PackingError)
        result = {"status": "refused", "reason": str(error), "cannot_pack": cannot_pack}
        return _end(folder, 2, result)
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
    """Train the steps; return their part of ``result.json``."""
    strategy = recipe.strategy()
    strategy.require_world(world.size)
    processing = load_processing(recipe)
    tokenizer = processing.tokenizer
    model = ready_model(recipe, tokenizer, _ignore, on_cpu=is_sharded(strategy, world))
    samples = read_samples(folder.parent / SAMPLES)
    featurizer = featurizer_for(model, recipe, processing, any(s.extra for s in samples), world)
    if featurizer is not None:
        require_packing_of_images(model, recipe)
    dtype = torch.float16 if computes_in(recipe.precision()) == "float16" else model.dtype
    masks = without_dropout(model)
    fill_zeros(model, recipe.seed)
    if job.exact:
        dtype = exact_dtype(model, dtype)
        recipe = make_exact(model, recipe, dtype)
    draws = (recipe.max_steps or 1) if job.fixed_weights else 1
    record = Record(model, folder, world.main, draws)
    optimize_model(model, recipe)
    console = Terminal(quiet=True)
    context = Context(
        recipe, tokenizer, console, interrupts, ThroughputMeter(), world=world,
        featurizer=featurizer,
    )  # fmt: skip
    numbers = [[i if i != FILLER else len(samples) - 1 for i in s] for s in job.sequences]
    trainer: Any = make_trainer(context, model, Packs(samples, numbers), kind=ProofTrainer)
    trainer.record = record
    peak = PeakMemory()
    trainer.train()
    peaks = world.gather(peak.peak())
    if not job.fixed_weights:
        record.keep_changes()
    rewrites, trained = _rewrites(model, recipe), {}
    if job.merges:
        trained["loss_trained"] = keep_adapter(model, tokenizer, samples[:-1], folder, featurizer)
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
        **rewrites,
        **trained,
    }


def _ignore(text: str) -> None:
    """Print nothing: the user knows the run's usual lines."""


def without_dropout(model: nn.Module) -> list[str]:
    """Set what a model draws at random in training to nothing; return what had been set.

    That is modules for dropout, and the attributes that attention and routers read.
    """
    names = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            names.add("dropout")
            module.p = 0.0
        for name, value in vars(module).items():
            random = "dropout" in name or "jitter" in name
            if random and isinstance(value, float) and value:
                names.add(name)
                setattr(module, name, 0.0)
    return sorted(names)


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


# --- the same model in a higher precision: the measure of rounding --------------------------------


_ROOM = 0.6
"""The share of the free memory that a model in fp64 may take, with gradients and optimizer."""

NO_ROOM = "there is not enough memory for the model in float64"


def exact_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the exact way, for a loaded model that computes in ``dtype``.

    fp32 for 16 bits and where activations are quantized (LLM.int8()), else fp64.
    """
    low = dtype != torch.float32 or _rounds_activations(model)
    return torch.float32 if low else torch.float64


def make_exact(model: Any, recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """Make a loaded model compute in ``dtype``, from ``exact_dtype``, in place.

    Quantized weights become the numbers that they represent. In fp64, what the model's code asks
    for in fp32 (norms, rotary embeddings) is computed in fp64, too. Returns the recipe to train by.

    Raises:
        RecipeError: ``NO_ROOM``.
    """
    wide = dtype == torch.float64
    if wide and not _fits(model):
        raise RecipeError(NO_ROOM)
    _dequantize(model)
    model.to(dtype)
    changed: dict[str, Any] = {
        "bf16": False, "bfloat16": False, "fp16": False, "float16": False, "float32": True,
        "load_in_4bit": False, "load_in_8bit": False, "tf32": False,
    }  # fmt: skip
    if wide:
        # what is recomputed in backward would be computed outside of the mode
        model.gradient_checkpointing_disable()
        changed["gradient_checkpointing"] = False
        model.forward = _widened(model.forward)
    return recipe.model_copy(update=changed)


def _widened(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Wide():
            return forward(*args, **kwargs)

    return call


def _fits(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 8 * (weights + 3 * trained) <= _ROOM * free


def _rounds_activations(model: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def _dequantize(model: Any) -> None:
    """Make every quantized linear a plain one, without rounding to the computation's dtype."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None:
            state.dtype = torch.float32
    dequantize_linears(model, torch.float32)


if __name__ == "__main__":
    os.environ.setdefault(PARENT, str(os.getppid()))
    end_with_parent()
    with ending_as_rank():
        sys.exit(main(Path(sys.argv[1])))
