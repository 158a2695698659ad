"""What to write into a recipe so that it fits, or runs faster; and how other methods compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..recipe.recipe import Recipe
from .count.layout import ProcessLayout
from .estimate import TrainingJob, estimate
from .search import fits, limits

MakeJob = Callable[[Recipe], TrainingJob]
"""Takes a step of another method's model; slow."""

_METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "load_in_4bit": False, "load_in_8bit": False},
    "LoRA": {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False},
    "QLoRA": {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False},
}
_EVERY_LINEAR = {"lora_target_linear": True, "lora_r": 16, "lora_alpha": 32}
_FSDP = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        keys: of a recipe, to be changed; empty: leave it as it is.
        reason: why.
        columns: ways to share the work.
        table: for each method and each way, the peak where blocks keep all and where they keep
            least, in bytes, and whether that fits.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    columns: tuple[str, ...] = ()
    table: dict[str, list[tuple[int, int, bool]]] = field(default_factory=dict)


def advise(
    job: TrainingJob, recipe: Recipe, layout: ProcessLayout, room: int, make: MakeJob
) -> Advice:
    """What to change, and how other methods compare.

    Args:
        job: what is run.
        recipe: it.
        layout: how its work is shared.
        room: bytes of a device.
        make: for other methods.
    """
    jobs = dict(_jobs(job, recipe, make))
    ways = _ways(layout.world)
    table = {
        method: [_cell(own, way, room) for way in ways.values()] for method, own in jobs.items()
    }
    own = faster(job, recipe, layout, room)
    if not fits(job, layout, room):
        own = Advice(*_leaner(jobs, recipe, layout, room))
    return replace(own, columns=tuple(ways), table=table)


def method_of(recipe: Recipe) -> str:
    """``full``, ``LoRA`` or ``QLoRA``."""
    if recipe.adapter is None:
        return "full"
    return "QLoRA" if recipe.load_in_4bit or recipe.load_in_8bit else "LoRA"


def _jobs(job: TrainingJob, recipe: Recipe, make: MakeJob) -> Iterator[tuple[str, TrainingJob]]:
    """The job of each method: LoRA's step serves QLoRA, too."""
    own = method_of(recipe)
    adapted = job if own != "full" else make(recipe.model_copy(update=_changes("LoRA", recipe)))
    for method in _METHODS:
        if method == own:
            yield method, job
        elif method == "full":
            yield method, make(recipe.model_copy(update=_METHODS["full"]))
        else:
            yield method, adapted.with_bits(4 if method == "QLoRA" else None)


def _changes(method: str, recipe: Recipe) -> dict[str, Any]:
    """The keys that make a recipe one of another method."""
    targets = recipe.lora_target_linear or recipe.lora_target_modules
    added = {} if method == "full" or targets else _EVERY_LINEAR
    return {**_METHODS[method], **added}


def _ways(world: int) -> dict[str, ProcessLayout]:
    """The ways in which ``world`` processes can share the work."""
    if world == 1:
        return {"one process": ProcessLayout("one process")}
    ways = {
        "DDP": ProcessLayout("DDP", world, replicate=world),
        "FSDP2": ProcessLayout("FSDP2", world, shard=world),
        "ZeRO-1": ProcessLayout("ZeRO-1", world),
        "ZeRO-2": ProcessLayout("ZeRO-2", world),
        "ZeRO-3": ProcessLayout("ZeRO-3", world, shard=world),
    }
    if world % 2 == 0 and world > 2:
        shard = min(8, world // 2)
        ways["HSDP"] = ProcessLayout("HSDP", world, shard=shard, replicate=world // shard)
    return ways


def _cell(job: TrainingJob, layout: ProcessLayout, room: int) -> tuple[int, int, bool]:
    levels = job.all_levels()
    most = estimate(job, layout, None, level=levels[0]).peak
    least = min(estimate(job, layout, None, level=v).peak for v in levels)
    return most, least, fits(job, layout, room)


def faster(job: TrainingJob, recipe: Recipe, layout: ProcessLayout, room: int) -> Advice:
    """For a run that fits: the same batch in fewer, larger passes, where there is room for them."""
    passes = recipe.accumulation()
    if passes == 1:
        return Advice()
    rows = limits(job, recipe, layout, room).largest_micro_batch
    fewer = (f for f in range(passes, 1, -1) if passes % f == 0)
    factor = next((f for f in fewer if f * recipe.micro_batch_size <= rows), 1)
    if factor == 1:
        return Advice()
    keys = {
        "micro_batch_size": recipe.micro_batch_size * factor,
        "gradient_accumulation_steps": passes // factor,
    }
    return Advice(keys, "the same batch in fewer passes, which fits, too")


def _leaner(
    jobs: dict[str, TrainingJob], recipe: Recipe, layout: ProcessLayout, room: int
) -> tuple[dict[str, Any], str]:
    """For a run that does not fit: the least change after which it does."""
    own = method_of(recipe)
    order = ["full", "LoRA", "QLoRA"]
    sharded = ProcessLayout("FSDP2", layout.world, shard=layout.world)
    fsdp = {} if layout.shards_weights or layout.world == 1 else _FSDP
    for method in order[order.index(own) :]:
        keys = {} if method == own else _written(method, recipe)
        for way, more in ((layout, {}), (sharded, fsdp)):
            for lean in ({}, {"memory": "auto"}):
                job = replace(jobs[method], memory=lean.get("memory", jobs[method].memory))
                if (keys or more or lean) and fits(job, way, room):
                    return {**keys, **more, **lean}, "with these it fits"
    smaller = _fewer_tokens(jobs[own], recipe, layout, room)
    if smaller:
        return smaller, "with fewer tokens at a time it fits"
    return {}, ""


def _written(method: str, recipe: Recipe) -> dict[str, Any]:
    """The keys of another method as one writes them."""
    keys = {"adapter": _METHODS[method]["adapter"], **_changes(method, recipe)}
    return {key: value for key, value in keys.items() if value not in (None, False)}


def _fewer_tokens(
    job: TrainingJob, recipe: Recipe, layout: ProcessLayout, room: int
) -> dict[str, Any]:
    lean = replace(job, memory="auto")
    rows = recipe.micro_batch_size
    passes = recipe.accumulation() * rows
    if rows > 1 and fits(replace(lean, passes=passes), layout, room, 1 / rows):
        return {"memory": "auto", "micro_batch_size": 1, "gradient_accumulation_steps": passes}
    longest = limits(lean, recipe, layout, room).longest_sequence
    return {"memory": "auto", "sequence_len": longest} if longest else {}
