"""Plans a run from its recipe and the configuration of the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...compiler.codegen.choice import choose
from ...compiler.options import Codegen
from ...errors import RecipeError
from ...kernels.processor import KINDS, assume
from ...memory.predict import compilation_bytes
from ..model.positions import positions
from ..model.precision import dtype_for_training, float16_weights
from ..recipe.preferences import PreferenceSettings, preference_settings
from ..recipe.recipe import Recipe
from ..report.throughput import layer_configs
from .cards import Card, Devices
from .count.blueprint import Blueprint, draw
from .count.images import ImageUsage, RowImages, row_images
from .count.layout import ProcessLayout, layout_of, model_states
from .count.network import Traffic, traffic
from .count.step import take
from .count.tensors import FSDPUnit, fsdp_units
from .estimate import Memory, Process, TrainingJob, estimate
from .here import CPU, devices_here
from .recommend import Advice, advise, faster
from .search import Headroom, fits, limits
from .speed import Speed, speed

_GPU_CONTEXT = 600 << 20
"""Bytes of a CUDA context with cuBLAS's workspaces on a GPU: assumed, until a GPU was measured."""

_CPU_SLACK = 0.9
"""On the CPU, malloc's overhead for each byte of activations, after some dozen steps with sequences
of different lengths (measured: 0.1 to 1.4)."""

_CPU_PROCESS = 690 << 20
"""Bytes of a process on the CPU without a model: the libraries, the rows, the tokenizer. Measured
(torch 2.13, transformers 5.24, SmolLM2's tokenizer, 2026-11-27).
"""


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        parameters: of the model, adapters included.
        trained: of these.
        between_steps: bytes of tensors that a process has between two steps.
        memory: the peak of a process, by what it is for.
        fits: whether that is at most nine tenths of the device.
        limits: what would still fit.
        steps: optimizer steps of the run; None: neither the recipe nor its rows say.
        steps_are_estimated: from the size of the rows' files.
        rewrites: formulas that are rewritten, by rule, in one block of each kind and the head.
        uncaptured: paths of blocks that run as they are, each with the reason.
        advice: what to change, and how other methods compare.
        images: of the rows, and what towers take for those of a micro batch; None: there are none.
    """

    recipe: Recipe
    devices: Devices
    layout: ProcessLayout
    parameters: int
    trained: int
    depth: int
    between_steps: int
    memory: Memory
    fits: bool
    limits: Headroom
    traffic: Traffic
    speed: Speed
    steps: int | None
    steps_are_estimated: bool
    rewrites: dict[str, int]
    uncaptured: dict[str, str]
    model_config: Any
    advice: Advice
    images: ImageUsage | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the run is planned for the CPU of this machine."""
        return self.devices.card.name == CPU

    @property
    def hours(self) -> float | None:
        """Hours of the whole run; None where the number of steps is not known."""
        return None if self.steps is None else self.steps * self.speed.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON; bytes, seconds and numbers of tokens."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
            data[field.name] = dataclasses.asdict(value) if is_record else value
        for name in ("recipe", "model_config"):
            del data[name]
        data["memory"]["peak"] = self.memory.peak
        data["devices"] = {"count": self.devices.count, **dataclasses.asdict(self.devices.card)}
        return {**data, "hours": self.hours}


def make_plan(
    recipe: Recipe, devices: Devices | None, processes: int | None = None, compare: bool = False
) -> RunPlan:
    """Plan a run on ``devices``, by default those of this machine.

    ``processes`` of this machine are by default as many as the recipe needs. ``compare`` finds out
    how other methods compare, which takes longer; it is done in any case where the recipe's own
    does not fit.

    Raises:
        RecipeError: the recipe does not fit the number of devices, or names no such model.
        ModelError: the model cannot be planned.
    """
    _require_known(recipe)
    dtype = _dtype(recipe, None if devices is None else devices.card)
    target = devices or devices_here(dtype, processes or recipe.strategy().world())
    layout = layout_of(recipe, target.count)
    make = functools.partial(
        make_job, dtype=dtype, on_cpu=target.card.name == CPU, images=row_images(recipe)
    )
    job, room = make(recipe), target.card.memory
    limit = limits(job, recipe, layout, room)
    reach = positions(job.blueprint.config)
    if reach is not None:
        limit = replace(limit, longest_sequence=min(limit.longest_sequence, reach), positions=reach)
    if compare or not fits(job, layout, room):  # then other methods may
        advice = advise(job, recipe, layout, target.card, make)
    else:
        advice = faster(job, recipe, layout, target.card)
    return _planned(job, recipe, layout, target, advice, limit)


def _planned(
    job: TrainingJob,
    recipe: Recipe,
    layout: ProcessLayout,
    devices: Devices,
    advice: Advice,
    limit: Headroom,
) -> RunPlan:
    room = devices.card.memory
    memory = estimate(job, layout, room)
    states = model_states(job.units, layout, recipe.optimizer)
    tokens = job.step.tokens
    keys = _keys_width(job)
    sent = traffic(job.units, layout, job.passes, tokens, job.hidden, keys)
    pace = speed(job, memory, layout, sent, devices.card)
    return RunPlan(
        recipe, devices, layout,
        parameters=_count(job, trained=False), trained=_count(job, trained=True),
        depth=job.blueprint.depth, between_steps=states.between_steps,
        memory=memory, fits=fits(job, layout, room), limits=limit, traffic=sent, speed=pace,
        steps=recipe.max_steps or _steps(recipe, pace.tokens, layout),
        steps_are_estimated=recipe.max_steps is None,
        rewrites=dict(job.step.rewrites), uncaptured=dict(job.step.uncaptured),
        model_config=job.blueprint.config, advice=advice, images=job.step.images,
    )  # fmt: skip


def _keys_width(job: TrainingJob) -> int | None:
    """The size of a token's keys in a layer, of all heads, where the configuration says it."""
    config = job.blueprint.config.get_text_config(decoder=True)
    widths = []
    for layer in layer_configs(config):
        heads, size = (getattr(layer, key, None) for key in ("num_key_value_heads", "head_dim"))
        if isinstance(heads, int) and isinstance(size, int):
            widths.append(heads * size)
    return max(widths, default=None)


def _steps(recipe: Recipe, tokens: int, layout: ProcessLayout) -> int | None:
    """By the size of the rows' files; ``tokens`` are those of an optimizer step."""
    if recipe.packs():
        epoch, each = estimate_tokens(recipe), tokens
    else:  # a step has so many rows, whatever their length
        epoch = count_rows(recipe)
        each = recipe.micro_batch_size * recipe.accumulation() * layout.data_ranks
    # the last step of an epoch has what is left of it
    return None if epoch is None else math.ceil(math.ceil(epoch / each) * recipe.num_epochs)


def make_job(
    recipe: Recipe, dtype: torch.dtype, on_cpu: bool, images: RowImages | None = None
) -> TrainingJob:
    """Take a step of what a recipe trains, on fake tensors.

    ``dtype`` is that of the weights that are not adapters; ``images`` are those of the rows.
    """
    blueprint = draw(recipe, dtype)
    codegen = _codegen(recipe, blueprint, "cpu" if on_cpu else "cuda")
    settings = preference_settings(recipe)
    # what a run on a card takes does not depend on the CPU that plans it: ops take there what they
    # take on a CPU that multiplies bfloat16
    with contextlib.nullcontext() if on_cpu else assume(KINDS["avx512_bf16"]):
        step = take(blueprint, recipe, codegen, settings.sequences if settings else 1, images)
    quantized = 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else None
    bits = blueprint.stored or quantized
    process = Process(_GPU_CONTEXT, 0, 0.05, is_host=False)
    if on_cpu:
        process = Process(_CPU_PROCESS, compilation_bytes(codegen), _CPU_SLACK, is_host=True)
    experts = recipe.quantize_moe_experts
    units = fsdp_units(blueprint, bits, experts)
    return TrainingJob(
        blueprint, units, step, recipe.optimizer,
        recipe.accumulation(), recipe.checkpointing(), recipe.memory, codegen, process,
        recipe.optimize, experts, _rate(recipe, dtype), _copies(recipe, settings),
        settings.extra_forward_passes if settings else 0,
        _weight_bytes(units, recipe.adapter is not None) if recipe.async_save else None,
    )  # fmt: skip


def _weight_bytes(units: Sequence[FSDPUnit], trained_only: bool) -> int:
    """Bytes of the weights that a checkpoint has."""
    return sum(u.times * w.bytes for u in units for w in u.weights if w.trains or not trained_only)


def _copies(recipe: Recipe, settings: PreferenceSettings | None) -> int:
    """Of the weights: with an adapter, the reference is the same model without it."""
    if settings is None or not settings.reference or recipe.adapter is not None:
        return 1
    return 1 if recipe.precompute_ref_log_probs else 2


def _rate(recipe: Recipe, dtype: torch.dtype) -> float:
    """The part of a GPU's peak in bfloat16 that ``dtype`` has: as on an A100."""
    if dtype is not torch.float32:
        return 1.0
    return 1 / 2 if recipe.tf32 is True else 1 / 16


def _codegen(recipe: Recipe, blueprint: Blueprint, device: str) -> Codegen:
    """The code generation for the blocks of the whole model, of which not all are here."""
    if not recipe.optimize:
        return "eager"
    whole: list[nn.Module] = [
        block for path, block in blueprint.blocks.items() for _ in range(blueprint.times[path])
    ]
    return "inductor" if choose(recipe.codegen, whole, device)[0] == "inductor" else "eager"


def _dtype(recipe: Recipe, card: Card | None) -> torch.dtype:
    precision, adapters = recipe.precision(), recipe.adapter is not None
    if card is None:  # the device here
        return dtype_for_training(precision, adapters)
    if precision == "float16" or (precision == "auto" and not card.bfloat16):
        return float16_weights(adapters)
    return torch.float32 if precision == "float32" else torch.bfloat16


def _count(job: TrainingJob, trained: bool) -> int:
    """How many numbers the model has: adapters included, packed ones counted one by one."""
    return sum(u.times * w.numbers for u in job.units for w in u.weights if w.trains or not trained)


def _require_known(recipe: Recipe) -> None:
    if recipe.peft_layer_replication:
        raise RecipeError("peft_layer_replication: plan does not know repeated blocks")


# The number of rows and tokens of a recipe, by its files.


_BYTES_PER_TOKEN = 4
"""Bytes of text for a token, with the JSON around it: assumed."""

_LINES = {".jsonl", ".csv", ".tsv"}
_TEXT = {".jsonl", ".json", ".csv", ".tsv", ".txt"}


def estimate_tokens(recipe: Recipe) -> int | None:
    """The tokens of an epoch; None where some rows are not in plain files on this machine."""
    total = 0.0
    for dataset in recipe.datasets:
        files = _files(Path(dataset.path))
        if not files or any(file.suffix not in _TEXT for file in files):
            return None
        size = sum(file.stat().st_size for file in files)
        total += size / _BYTES_PER_TOKEN * (dataset.weight or 1) / (dataset.shards or 1)
    validation = recipe.val_set_size if 0 < recipe.val_set_size < 1 else 0
    return round(total * (1 - validation)) or None


def count_rows(recipe: Recipe) -> int | None:
    """The rows of an epoch, by the lines of their files.

    None where some rows are not in files of one row a line on this machine.
    """
    total = 0.0
    for dataset in recipe.datasets:
        files = _files(Path(dataset.path))
        if not files or any(file.suffix not in _LINES for file in files):
            return None
        rows = sum(_lines(file) for file in files)
        total += rows * (dataset.weight or 1) / (dataset.shards or 1)
    validation = recipe.val_set_size
    return round(total * (1 - validation) if validation < 1 else total - validation) or None


def _lines(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(1 for line in opened if line.strip()) - (file.suffix in (".csv", ".tsv"))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
